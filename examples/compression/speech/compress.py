"""Spoken keywords: train, prune, distill and quantize, measure all of it, and take samples of sound in the end.

`python examples/compression/speech/compress.py [OUTPUT]` with OUTPUT build/compression/speech by default; needs
espeak-ng (`apt-get install espeak-ng`), which speaks the words.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import common  # noqa: E402
import data  # noqa: E402

# The best of them takes samples in place of log-mels, and is measured on the test set as samples.
BEST, SERVED, SERVED_REPORT = "distilled-int8", "served", "served.json"
DEVICES = tuple(word for device in common.RUNTIMES for word in ("--device", device))


def prepare(output: Path, quick: bool) -> None:
    """Speak the words, where that is not done yet; minutes."""
    if not (output / "data" / "data.json").is_file():
        print("\nclips: espeak-ng speaks", flush=True)
        data.write(output / "data", quick=quick)


def stages(quick: bool) -> list[common.Stage]:
    """From the clips to the model that takes samples."""

    def passes(full: int, few: int = 1) -> list[str]:
        return ["--epochs", str(few if quick else full), "--batch", "32"]

    learn = ["--data", "train.zarr", "--eval", "val.zarr", "--metric", "accuracy", "--seed", "0"]
    return [
        *(common.Stage(f"{name}.zarr", ["data", "pack", f"data/{name}.npz"]) for name in ("train", "val", "test")),
        common.Stage("waves.zarr", ["data", "pack", "data/waves.npz"]),
        common.Stage(
            "baseline",
            [
                "finetune", "model.py:teacher", *learn, *passes(5), "--learning-rate", "2e-3",
                "--schedule", "one-cycle",
            ],
            resumes=True,
        ),
        common.Stage("calib.zarr", ["data", "select", "train.zarr", "-m", "baseline", "-n", str(24 if quick else 256)]),
        _int8("baseline"),
        common.Stage(
            "pruned",
            [
                "prune", "model.py:trained", *learn, "--ratio", "0.5", "--round-to", "8", "--allow-slower",
                "--gate-seconds", "0", *passes(2), "--learning-rate", "1e-3",
            ],
            resumes=True,
        ),
        _int8("pruned"),
        common.Stage(
            "distilled",
            [
                "distill", "model.py:trained", "--student", "model.py:student", *learn, *passes(14, 6),
                "--learning-rate", "4e-3", "--schedule", "one-cycle",
            ],
            resumes=True,
        ),
        _int8("distilled"),
        common.Stage(
            SERVED, ["preprocess", "audio", "-m", BEST, *data.front_options(), "--data", "data/calib-waves.npz"]
        ),
        common.Stage(
            SERVED_REPORT,
            [
                "benchmark", "-m", SERVED, *DEVICES, "--data", "waves.zarr", "--rounds", "3", "--seconds",
                "0.05" if quick else "0.5", "--warmup", "0.1",
            ],
            resumes=True,
        ),
    ]  # fmt: skip


def _int8(name: str) -> common.Stage:
    # How fast it is, all are asked together in the end.
    return common.Stage(
        f"{name}-int8",
        [
            "quantize", "static", "-m", name, "--data", "calib.zarr", "--eval", "val.zarr", "--max-drop", "0.01",
            "--allow-slower", "--gate-seconds", "0",
        ],
    )  # fmt: skip


def further(output: Path) -> Sequence[str]:
    """What stands under the table: the test set, and what the model gives that takes samples."""
    made = json.loads((output / "data" / "data.json").read_text(encoding="utf-8"))["splits"]
    test, train = made["test"], made["train"]
    lines = [
        f"Test set: {test['clips']:,} clips by {test['voices']} voices; training: {train['clips']:,} clips by "
        f"{train['voices']}, none of which is heard in the test set"
    ]
    for device, name in common.RUNTIMES.items():
        found, before = (
            _candidate(output / SERVED_REPORT, SERVED, device),
            _candidate(output / common.REPORT, BEST, device),
        )
        score, known = found["accuracy"], before["accuracy"]
        lines.append(
            f"{BEST} from samples, log-mels in the graph, in {name}: accuracy {100 * score['accuracy']:.2f} % (from "
            f"log-mels {100 * known['accuracy']:.2f} %), macro F1 {100 * score['f1']:.2f} %, "
            f"{found['median_ms']:.3f} ms a second of sound"
        )
    return lines


def _candidate(report: Path, model: str, device: str) -> dict:
    candidates = json.loads(report.read_text(encoding="utf-8"))["candidates"]
    return next(found for found in candidates if found["name"] == model and found["device"] == device)


if __name__ == "__main__":
    common.run(
        common.Example("speech", HERE, ("model.py",), prepare, stages, common.MODELS, "test.zarr", further=further)
    )
