"""`optimize` against everything that it could have chosen: python benchmarks/suite/optimize_grid.py [--budget S]

A small convolutional net, trained on scikit-learn's digits, is searched within a budget. Then every variant that the
search can make is made, judged, and measured in every runtime with every combination of settings that the tuner knows,
each in a process of its own; the whole takes as long as it takes. In the end the search's choice and the grid's best
that keeps the target are measured side by side, in rounds. Printed is how much slower the choice is, and the share of
the grid's time that the search took.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tuner_grid import grid_of, whole_grid

import deploykit
from deploykit.artifact import Artifact
from deploykit.benchmarks import Candidate, Settings, measure
from deploykit.benchmarks.arena import ProcessArena
from deploykit.benchmarks.tuner_space import Config, stages_for
from deploykit.comparing import find_targets
from deploykit.data import Dataset
from deploykit.goals import Goal, Judge
from deploykit.machine import allowed_cores, inspect_machine
from deploykit.models import benchmark_feeds, load_model
from deploykit.progress import TerminalProgress
from deploykit.schemes import SCHEMES

SOURCE = """
import torch
from pathlib import Path
from torch import nn


def net(width=96):
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * width, 10),
    )
    weights = Path(__file__).with_name("weights.pt")
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval(), torch.zeros(1, 1, 8, 8)
"""


def write_source(folder: Path) -> str:
    """Train a classifier of digits, a few layers wide; gives what `deploykit export` takes."""
    import torch
    from sklearn.datasets import load_digits

    (folder / "net.py").write_text(SOURCE, encoding="utf-8")
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor((pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8))
    y = torch.tensor(labels)
    model = runpy.run_path(str(folder / "net.py"))["net"]()[0].train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(5):
        for part in torch.randperm(1200).split(50):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    torch.save(model.state_dict(), folder / "weights.pt")
    return f"{folder / 'net.py'}:net"


def write_data(folder: Path) -> None:
    """Calibration data out of the training set, and the held-out rest."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    np.savez(folder / "calib.npz", x=x[:256])
    np.savez(folder / "eval.npz", x=x[1200:], labels=labels[1200:])


def variants(raw: Path, folder: Path) -> dict[str, Path]:
    """Every usual scheme's artifact, as the search would make it, and the export."""
    made = {"export": Artifact.open(raw).model_path}
    for name, scheme in SCHEMES.items():
        if not scheme.usual:
            continue
        given: dict[str, Any] = {"data": folder / "calib.npz", "allow_slower": True, "gate_seconds": 0}
        try:
            made[name] = scheme.verb(raw, folder / f"grid-{name}", **given).model_path
        except deploykit.DeploykitError as exc:
            print(f"{name}: {exc}")
    return made


def everything(made: dict[str, Path], raw: Path, folder: Path, seconds: float) -> dict[tuple[str, str, Config], float]:
    """Nanoseconds a request of every variant that keeps the target, on every device, with all settings."""
    parent, data = load_model(raw), Dataset.open(folder / "calib.npz")
    feeds, _, _ = benchmark_feeds(parent, data, 1, {})
    paces: dict[tuple[str, str, Config], float] = {}
    for device in find_targets(())[0]:
        with tempfile.TemporaryDirectory() as scratch:
            goal = Goal("accuracy", 0.01)
            judge = Judge(parent.path, parent.signature, device, Dataset.open(folder / "eval.npz"), goal, Path(scratch))
            right = {name: path for name, path in made.items() if judge.judge(path).met}
        for name, path in right.items():
            candidate = Candidate(name, str(path), str(device), "", 0)
            stages = stages_for(str(device), "latency", inspect_machine(), native=False, batches=False)
            with (
                tempfile.TemporaryDirectory() as scratch,
                ProcessArena(candidate, Settings(), lambda n: feeds, Path(scratch)) as arena,
            ):
                found = whole_grid(arena, grid_of(Config(allowed_cores()), stages), seconds)
            paces |= {(name, str(device), config): pace for config, pace in found.items()}
    return paces


def main() -> int:
    """Print what the search chose, what the grid found, and how far apart they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=180.0, help="seconds for the search")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each combination of the grid")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the grid here")
    options = parser.parse_args()
    print(inspect_machine())
    with tempfile.TemporaryDirectory(prefix="grid-") as name:
        folder = Path(name)
        write_data(folder)
        deploykit.export(write_source(folder), folder / "raw", progress=TerminalProgress())
        began = time.monotonic()
        found = deploykit.optimize(
            folder / "raw", folder / "best", data=folder / "calib.npz", eval_data=folder / "eval.npz",
            metric="accuracy", max_drop=0.01, budget_s=options.budget, cache=False, progress=TerminalProgress(),
        )  # fmt: skip
        searched = time.monotonic() - began
        print(found.headline)
        began = time.monotonic()
        made = variants(folder / "raw", folder)
        paces = everything(made, folder / "raw", folder, options.seconds)
        took = time.monotonic() - began
        model, device, config = min(paces, key=lambda key: paces[key])
        kept = json.loads((found.artifact.path / "settings.json").read_text(encoding="utf-8"))
        loaded = load_model(found.artifact.path)
        choice = Candidate(
            "the choice", str(loaded.path), kept["device"], loaded.digest, loaded.size_bytes, tuned=True,
            threads=kept["threads"], precision=kept["precision"], optimize=kept["optimize"], settings=kept["settings"],
        )  # fmt: skip
        best = Candidate(
            "the grid's best", str(made[model]), device, "", 0, tuned=True, threads=config.threads,
            precision=config.precision, optimize=config.optimize, settings=dict(config.settings),
        )  # fmt: skip
        feeds, _, _ = benchmark_feeds(loaded, Dataset.open(folder / "calib.npz"), 1, {})
        settings = replace(Settings(), rounds=options.rounds, seconds=1.0, warmup_s=0.3, min_cosine=-1, max_drop=1.0)
        report = measure([best, choice], feeds, settings, progress=TerminalProgress())
        against = report.candidates[1]["against_reference"]
        print(f"grid of {len(paces)} in {took:.0f} s, best: {model} on {device}, {config.label}")
        print(
            f"the search in {searched:.0f} s ({searched / took:.0%}) chose {found.document['winner_seat']}: "
            f"{1 / against['ratio'] - 1:+.1%} [{1 / against['high'] - 1:+.1%}, {1 / against['low'] - 1:+.1%}] slower"
        )
        if options.json:
            rows = [{"model": m, "device": d, **c.as_dict(), "ns": p} for (m, d, c), p in paces.items()]
            options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
