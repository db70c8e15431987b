"""kill -9 a training at random moments, and on: python benchmarks/suite/train_kill.py [--kills N]

A classifier of handwritten digits is trained once to the end, with everything that has a state or is random: shuffling,
dropout, mixup, a moving average, one-cycle, the best weights. Then the same training is killed and resumed, again and
again, until it was killed so many times: one time in four anywhere from its start on, else a random time after its
first checkpoint in that process, which is where there is something to lose. The last one runs to the end, and so does
every one that is through before its kill comes, after which it begins anew. No kill may lose a checkpoint: each has to
be readable, and never of an earlier step than the one before. In the end metric, history and weights have to be those
of the undisturbed run. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

SOURCE = """
import torch
from torch import nn


class Net(nn.Sequential):
    def forward(self, image):
        return super().forward(image)


def make():
    torch.manual_seed(0)
    return Net(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(256, 10),
    ), (torch.rand(2, 1, 8, 8),)
"""


def prepare(folder: Path) -> None:
    """Write the source and the data."""
    (folder / "net.py").write_text(SOURCE, encoding="utf-8")
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng(0).permutation(len(labels))
    for name, part in (("train", order[:1200]), ("eval", order[1200:])):
        np.savez(folder / f"{name}.npz", image=images[part], labels=labels[part])


def command(output: str, epochs: int, *, resume: bool) -> list[str]:
    """The training."""
    return [
        sys.executable, "-m", "deploykit", "finetune", "net.py:make", "-o", output, "--data", "train.npz", "--eval",
        "eval.npz", "--epochs", str(epochs), "--batch", "32", "--learning-rate", "3e-3", "--schedule", "one-cycle",
        "--mixup", "0.2", "--ema", "0.99", "--checkpoint-minutes", "0.002", "--device", "ort:cpu",
        *(["--resume"] if resume else []),
    ]  # fmt: skip


def start(folder: Path, told: list[str]) -> subprocess.Popen[str]:
    """Begin it on one thread: another number of them adds in another order."""
    return subprocess.Popen(
        told, cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def killed(child: subprocess.Popen[str], seconds: float, awaited: Path | None) -> bool:
    """Kill it after some seconds, or so long after a file was written anew; False where it ended before by itself."""
    before = _written(awaited)
    while awaited is not None and _written(awaited) == before and child.poll() is None:
        time.sleep(0.005)
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return True
    return False


def _written(file: Path | None) -> int:
    return file.stat().st_mtime_ns if file is not None and file.exists() else 0


def finish(child: subprocess.Popen[str]) -> None:
    """Wait for its end.

    Raises:
        SystemExit: It failed.
    """
    _, said = child.communicate()
    if child.returncode:
        raise SystemExit(f"it failed: {said.strip().splitlines()[-1]}")


def checkpoint(work: Path) -> tuple[int, str]:
    """The step of the last checkpoint, and what else it says; whatever stands there has to be readable."""
    if not (work / "last.ckpt").exists():
        return 0, "no checkpoint yet"
    state = torch.load(work / "last.ckpt", weights_only=True)["deploykit"]
    best = state["best_epoch"]
    if best is not None and not state["stopped"]:
        torch.load(work / f"best-{best}.pt", weights_only=True)
    return int(state["step"]), f"epoch {state['epoch'] + 1}, best {'none' if best is None else f'of epoch {best}'}"


def result(folder: Path, output: str) -> dict[str, Any]:
    """Metric, history and weights of a training that is through."""
    manifest = json.loads((folder / output / "manifest.json").read_text(encoding="utf-8"))
    params = manifest["lineage"][0]["params"]
    (record,) = manifest["evidence"]["accuracy"]
    return {
        "metric": record["value"],
        "seconds": params["history"][-1]["seconds"],
        "history": [{n: v for n, v in entry.items() if n != "seconds"} for entry in params["history"]],
        "weights": torch.load(folder / f"{output}.training" / "weights.pt", weights_only=True),
    }


def compare(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    """How far two trainings are from one another.

    Raises:
        SystemExit: Too far.
    """
    far = max(float((wanted["weights"][n] - t).abs().max()) for n, t in found["weights"].items())
    same_bits = all(torch.equal(wanted["weights"][n], t) for n, t in found["weights"].items())
    same_history = wanted["history"] == found["history"]
    weights = "bit for bit the same" if same_bits else f"off by {far:g}"
    told = (
        f"metric {found['metric']:.4f} (undisturbed {wanted['metric']:.4f}), history "
        f"{'the same' if same_history else 'not the same'}, weights {weights}"
    )
    if found["metric"] != wanted["metric"] or far > 1e-4 or len(wanted["history"]) != len(found["history"]):
        raise SystemExit(f"another training: {told}")
    return told


def main() -> int:
    """Print every kill, and whether the end is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="train-kill-") as name:
        folder = Path(name)
        prepare(folder)
        began = time.monotonic()
        finish(start(folder, command("whole", options.epochs, resume=False)))
        whole = time.monotonic() - began
        wanted = result(folder, "whole")
        print(f"undisturbed in {whole:.1f} s: metric {wanted['metric']:.4f}, {len(wanted['history'])} epochs\n")
        print("| kill | seconds | after | checkpoint at step | |\n|---|---|---|---|---|", flush=True)
        training = wanted["seconds"]
        kills = step = ended = 0
        while kills < options.kills:
            work = folder / "cut.training"
            anywhere = draw.random() < 0.25
            after = draw.uniform(0.5, whole) if anywhere else draw.uniform(0, training / 3)
            child = start(folder, command("cut", options.epochs, resume=True))
            if killed(child, after, None if anywhere else work / "last.ckpt"):
                kills += 1
                now, said = checkpoint(work)
                since = "its start" if anywhere else "a checkpoint"
                print(f"| {kills} | {after:.2f} | {since} | {now} | {said} |", flush=True)
                if now < step:
                    raise SystemExit(f"a checkpoint was lost: step {now} after step {step}")
                step = now
            else:
                finish(child)
            if not (folder / "cut").exists():
                continue
            ended += 1
            print(f"| - | - | - | its end | {compare(wanted, result(folder, 'cut'))} |", flush=True)
            shutil.rmtree(folder / "cut")
            shutil.rmtree(work)
            step = 0
        finish(start(folder, command("cut", options.epochs, resume=True)))
        print(f"\n{kills} kills, {ended + 1} trainings that ended: {compare(wanted, result(folder, 'cut'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
