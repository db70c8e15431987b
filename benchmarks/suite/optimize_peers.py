"""What `optimize` finds against the best file of each peer: python benchmarks/suite/optimize_peers.py [NAME ...]

ResNet-50, MobileNetV2 and ViT-tiny with random weights, which serve for speed only, and MiniLM with its own. The
peers' files are those of `quantized_shapes.py`, onnxruntime's dynamic quantization by channel, and with
`--foreign PYTHON` those of Microsoft Olive and Hugging Face Optimum (see `foreign_files.py` for that Python's
environment). `deploykit.optimize` gets the exported model, 64 samples and a target that the best peer keeps as well.
Then all of it is timed in one interleaved run, each file in each runtime with the runtime's defaults, and the winner as
it is to be served. Printed is the speed as a ratio to float32 in ONNX Runtime, the cosine to float32's outputs, and the
winner against the best peer that is right.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import foreign_files
from quantized_shapes import DEVICES, NAMES, cosine, make

import deploykit
from deploykit.artifact import Artifact
from deploykit.benchmarks import Candidate, Settings, measure
from deploykit.data import Dataset
from deploykit.machine import inspect_machine
from deploykit.models import benchmark_feeds, load_model
from deploykit.progress import TerminalProgress

# dB of the outputs that a result has to keep: what the least cosine below comes to, and a little more.
TARGETS = {"resnet50": 14.0, "mobilenetv2": 11.0, "vit-tiny": 17.5, "minilm": 17.5}
# A file is right where the cosine of its outputs to float32's is at least this: a peer that is a little less accurate
# than ours still counts.
LEAST = {"resnet50": 0.975, "mobilenetv2": 0.955, "vit-tiny": 0.99, "minilm": 0.99}
OURS, DYNAMIC = "deploykit optimize", "onnxruntime dynamic"


def add_dynamic(files: dict[str, Path], missing: dict[str, str], folder: Path) -> None:
    """onnxruntime's dynamic quantization by channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = folder / "dynamic.onnx"
    try:
        quantize_dynamic(str(files["fp32"]), str(target), per_channel=True, weight_type=QuantType.QInt8)
        files[DYNAMIC] = target
    except Exception as exc:
        missing[DYNAMIC] = f"{type(exc).__name__}: {str(exc)[:150]}"


def add_foreign(files: dict[str, Path], missing: dict[str, str], folder: Path, python: str | None) -> None:
    """What Olive and Optimum make of the float32 model."""
    if python is None:
        missing["Olive and Optimum"] = f"not made; how to: {foreign_files.HOW}"
        return
    made, failed = foreign_files.made_by(python, files["fp32"], folder / "data.npz", folder / "foreign")
    missing |= failed
    for label, file in made.items():
        try:
            load_model(file)
            files[label] = file
        except deploykit.DeploykitError as exc:
            missing[label] = str(exc)[:150]


def near(files: dict[str, Path], entry: Any, data: Any) -> float | None:
    """The cosine of a candidate's outputs to float32's; None where the runtime does not run the file."""
    return cosine(files, entry["name"], data, entry["device"]) if "median_ms" in entry else None


def compare(name: str, batch: int, folder: Path, options: argparse.Namespace, made: Any) -> dict[str, Any]:
    """Search, measure, print; gives the figures."""
    files, missing, data = made
    told, began = TerminalProgress(), time.monotonic()
    found = deploykit.optimize(
        folder / "raw", folder / f"best-{batch}", data=folder / "data.npz", min_sqnr=TARGETS[name], batch=batch,
        budget_s=options.budget, progress=told,
    )  # fmt: skip
    spent = time.monotonic() - began
    reference = load_model(files["fp32"])
    feeds, origin, size = benchmark_feeds(reference, Dataset.open(folder / "data.npz"), batch, {})
    candidates = [
        Candidate(label, str(m.path), device, m.digest, m.size_bytes)
        for label, file in files.items() if label != "deploykit"
        for m in (load_model(file),) for device in DEVICES
    ]  # fmt: skip
    artifact = found.artifact
    kept = json.loads((artifact.path / "settings.json").read_text(encoding="utf-8"))
    candidates.append(
        Candidate(
            OURS,
            str(artifact.model_path),
            kept["device"],
            artifact.digest,
            artifact.size_bytes,
            precision=kept["precision"],
            threads=kept["threads"],
            sessions=kept["sessions"],
            optimize=kept["optimize"],
            settings=kept["settings"],
            tuned=True,
        )
    )
    settings = Settings(
        rounds=options.rounds, seconds=options.seconds, warmup_s=0.3, batch=size, min_cosine=-1, max_drop=1.0,
        inputs=origin, confirm=False,
    )  # fmt: skip
    report = measure(candidates, feeds, settings, progress=told)
    files = {**files, OURS: artifact.model_path}
    rows = [
        {"file": e["name"], "device": e["device"], "cosine": near(files, e, data), "timed": "median_ms" in e,
         "status": e["status"], **(e.get("against_reference") or {"ratio": 1.0, "low": 1.0, "high": 1.0})}
        for e in report.candidates
    ]  # fmt: skip
    least = LEAST[name]
    floor = report.data["noise_floor"]
    print(f"\n{name}, batch {batch}; noise floor {floor:.1%}; searched {spent:.0f} s of {options.budget:g}")
    for row in rows:
        if not row["timed"]:
            print(f"{row['file']:22} {row['device']:13} {row['status']}")
            continue
        wrong = "" if row["cosine"] >= least else "  (too inaccurate)"
        print(
            f"{row['file']:22} {row['device']:13} {row['ratio']:5.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            f"  cosine {row['cosine']:.4f}{wrong}"
        )
    for label, why in missing.items():
        print(f"{label:22} {why}")
    ours = rows[-1]
    right = [r for r in rows[:-1] if r["timed"] and r["cosine"] >= least]
    best = max(right, key=lambda r: float(r["ratio"]))
    ahead = ours["ratio"] / best["ratio"]
    print(
        f"{found.headline}\nahead of the best peer that is right, {best['file']} on {best['device']}: {ahead:.2f}x",
        flush=True,
    )
    return {"model": name, "batch": batch, "spent_s": spent, "headline": found.headline, "ahead": ahead, "rows": rows}


def main() -> int:
    """Print a table for each model and batch, and the geometric mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(NAMES))
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for a search")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--foreign", metavar="PYTHON", help="of the environment with Olive and Optimum")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    print(inspect_machine())
    figures = []
    for name in options.names or NAMES:
        with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
            folder = Path(scratch)
            made = make(name, folder)
            add_dynamic(made[0], made[1], folder)
            add_foreign(made[0], made[1], folder, options.foreign)
            Artifact.open(folder / "raw")
            figures += [compare(name, batch, folder, options, made) for batch in options.batch]
    mean = math.exp(sum(math.log(f["ahead"]) for f in figures) / len(figures))
    print(f"\ngeometric mean over {len(figures)} runs: {mean:.3f}x the best peer")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
