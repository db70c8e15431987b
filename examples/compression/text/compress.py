"""MiniLM fine-tuned on review lines, then quantized, pruned and distilled, in one table.

python examples/compression/text/compress.py [OUTPUT]; OUTPUT is build/compression/text by default.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import data  # noqa: E402
import model  # noqa: E402

# Lines of a quick run: of the training, of the other parts, and the layers of its MiniLM.
QUICK_TRAIN, QUICK_REST, QUICK_LAYERS = 192, 64, 1
CALIBRATION = 256
# Measured once more, on lines of the median length as they are; the table's requests are filled up.
TYPICAL, BEST = "typical.json", "distilled-int8"
QUICK_INT8 = ["--data", "calib.npz", "--max-samples", "32", "--min-cosine", "-1", "--gate-seconds", "0"]
DYNAMIC = [part for name in model.INPUTS for part in ("--dynamic", f"{name}:0=batch,1=sequence")]


def prepare(output: Path, quick: bool) -> None:
    """Write the model to begin with, and all data."""
    start = output / "start"
    if not start.is_dir():
        model.write_start(start, QUICK_LAYERS if quick else None)
    wanted = [output / f"{name}.npz" for name in ("train", "val", "test", "learn", "calib")]
    typical = output / "typical.npz"
    if all(path.is_file() for path in (*wanted, typical)):
        return
    parts = data.split(data.read(data.fetch(output)))
    if quick:
        parts = {name: lines[: QUICK_TRAIN if name == "train" else QUICK_REST] for name, lines in parts.items()}
    tokenizer = model.load_tokenizer(start)
    rows = {name: data.encode(tokenizer, lines) for name, lines in parts.items()}
    train = rows["train"]
    learn = data.joined(train, rows["unlabelled"], data.stretched(train))
    calib = {name: array[:CALIBRATION] for name, array in train.items()}
    common.save_arrays(typical, **data.typical(rows["test"]))
    for path, found in zip(wanted, (train, rows["validation"], rows["test"], learn, calib), strict=True):
        common.save_arrays(path, **found)
        share = (found["labels"] == 1).sum() / max(1, (found["labels"] >= 0).sum())
        print(f"{path.name}: {len(found['labels']):,} lines, {share:.1%} of those with a label are positive")


def stages(quick: bool) -> list[common.Stage]:
    """The commands."""
    judged = ["--eval", "val.npz", "--trim-padding"]
    int8 = ["--data", "calib.npz", "--gate-seconds", "2", "--allow-slower"]

    def quantized(name: str, kind: str) -> common.Stage:
        return common.Stage(f"{name}-int8", ["quantize", kind, "-m", name, *(QUICK_INT8 if quick else int8)])

    return [
        common.Stage(
            "baseline",
            ["finetune", "start", "--data", "train.npz", *judged, "--epochs", "1" if quick else "2", "--batch", "32",
             "--learning-rate", "1e-4", "--warmup", "0.1"],
            resumes=True,
        ),
        quantized("baseline", "static"),
        common.Stage(
            "pruned",
            ["prune", "baseline.training/model", "--ratio", "0.5", "--data", "train.npz", *judged, "--epochs", "1",
             "--batch", "32", "--learning-rate", "1e-4", "--gate-seconds", "0" if quick else "4", "--allow-slower"],
            resumes=True,
        ),
        quantized("pruned", "static"),
        common.Stage(
            "distilled",
            ["distill", "baseline.training/model", "--student", "model.py:student", *DYNAMIC, "--data", "learn.npz",
             *judged, "--metric", "accuracy", "--epochs", "1" if quick else "3", "--batch", "32", "--learning-rate",
             "3e-4", "--temperature", "2"],
            resumes=True,
        ),
        quantized("distilled", "static"),
        common.Stage(
            TYPICAL,
            ["benchmark", "-m", "baseline", "-m", BEST, "--data", "typical.npz", "--min-cosine", "-1", "--rounds", "3",
             "--seconds", "0.05" if quick else "1", "--warmup", "0" if quick else "0.3",
             *(part for device in common.RUNTIMES for part in ("--device", device))],
        ),
    ]  # fmt: skip


def further(output: Path) -> Sequence[str]:
    """What stands under the table: how fast a line of the usual length is, without padding."""
    with np.load(output / "typical.npz") as rows:
        length = rows["input_ids"].shape[1]
    report = json.loads((output / TYPICAL).read_text(encoding="utf-8"))
    ms = {(found["name"], found["device"]): found["median_ms"] for found in report["candidates"]}
    return [
        f"A line of {length} tokens, the median, without padding, in {name}: {ms['baseline', device]:.3f} ms and "
        f"{ms[BEST, device]:.3f} ms ({BEST}), {ms['baseline', device] / ms[BEST, device]:.2f}x faster"
        for device, name in common.RUNTIMES.items()
    ]


if __name__ == "__main__":
    common.run(common.Example("text", HERE, ["model.py"], prepare, stages, common.MODELS, "test.npz", further=further))
