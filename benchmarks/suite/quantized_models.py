"""What int8 costs and gains on really trained models: python benchmarks/suite/quantized_models.py [NAME ...]

Exports each model of `real_models.py`, quantizes it with onnxruntime's defaults (static and dynamic) and with
DeployKit (its own engine, and NNCF), and prints for each file the task's own metric in ONNX Runtime and OpenVINO on the
whole test set, and its speed at batch 1 as a ratio to float32 in ONNX Runtime, all out of one interleaved run. Figures
of speed are this machine's, whose name and instruction sets are printed first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import deploykit
from deploykit.errors import DeploykitError
from deploykit.machine import inspect_machine
from deploykit.progress import TerminalProgress
from deploykit.runtimes import open_session

_SUITE = Path(__file__).parent
sys.path.insert(0, str(_SUITE))
import real_models

NAMES = ("residual", "depthwise", "minilm", "crepe")
DEVICES = ("ort:cpu", "openvino:cpu")
_CENTS_50 = 2.5  # in CREPE's classes of 20 cents: the usual threshold of raw pitch accuracy


def score(name: str, outputs: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy; for pitch, the share of frames within 50 cents."""
    chosen = outputs.argmax(1)
    return float(np.mean(np.abs(chosen - labels) < _CENTS_50 if name == "crepe" else chosen == labels))


def evaluate(name: str, model: Path, device: str, test: dict[str, np.ndarray]) -> float:
    """The metric of a model file over the test set."""
    labels, found = test["labels"], []
    with open_session(model, device) as session:
        first = session.signature.outputs[0].name
        for start in range(0, len(labels), 50):
            feeds = {s.name: test[s.name][start : start + 50] for s in session.signature.inputs}
            found.append(session.run(feeds)[first])
    return score(name, np.concatenate(found), labels)


class _Reader:
    """Calibration data as onnxruntime reads them."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        count = len(next(iter(arrays.values())))
        self._feeds = iter([{n: a[i : i + 8] for n, a in arrays.items()} for i in range(0, count, 8)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def theirs(kind: str, source: Path, target: Path, calibration: dict[str, np.ndarray]) -> None:
    """What onnxruntime's documentation does: pre-processing where it works, then its defaults."""
    from onnxruntime.quantization import quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(str(source), str(prepared))
    except Exception:
        prepared = source
    if kind == "dynamic":
        quantize_dynamic(str(prepared), str(target))
    else:
        quantize_static(str(prepared), str(target), _Reader(calibration))


def make_files(name: str, folder: Path, extra: list[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Every candidate's file, and why others are not there."""
    calibration, test = getattr(real_models, f"{name}_data")()
    np.savez(folder / "calibration.npz", **calibration)
    np.savez(folder / "test.npz", **test)
    told = TerminalProgress()
    data = folder / "calibration.npz"
    exported = deploykit.export(f"{_SUITE / 'real_models.py'}:{name}", folder / "exported", data=data, progress=told)
    fp32 = deploykit.simplify(exported.path, folder / "fp32", progress=told).path
    parent = fp32 / "model.onnx"
    static: dict[str, Any] = json.loads(extra[0]) if extra else {}
    made: dict[str, Path] = {"fp32": parent}
    missing: dict[str, str] = {}
    from deploykit.optimizers import StaticConfig

    def ours(out: Path, config: StaticConfig) -> None:
        deploykit.quantize_static(fp32, out, data=data, config=config, min_cosine=-1, gate_seconds=0, progress=told)

    steps: dict[str, Callable[[Path], Any]] = {
        "onnxruntime static": lambda out: theirs("static", parent, out, calibration),
        "onnxruntime dynamic": lambda out: theirs("dynamic", parent, out, calibration),
        "deploykit static": lambda out: ours(out, StaticConfig(**static)),
        "deploykit static nncf": lambda out: ours(out, StaticConfig(engine="nncf")),
        "deploykit dynamic": lambda out: deploykit.quantize_dynamic(
            fp32, out, min_cosine=-1, gate_seconds=0, progress=told
        ),
    }
    for label, step in steps.items():
        artifact = label.startswith("deploykit")
        out = folder / label.replace(" ", "-") if artifact else folder / f"{label.replace(' ', '-')}.onnx"
        try:
            step(out)
            made[label] = out / "model.onnx" if artifact else out
        except DeploykitError as exc:
            missing[label] = str(exc)
        except Exception as exc:
            missing[label] = f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"[:200]
    return made, missing


def speeds(files: dict[str, Path], folder: Path, rounds: int, seconds: float) -> dict[tuple[str, str], float]:
    """Speed as a ratio to float32 in ONNX Runtime, by file and device, from interleaved rounds at batch 1."""
    report = deploykit.benchmark(
        list(files.values()), devices=DEVICES, data=folder / "calibration.npz", rounds=rounds, seconds=seconds,
        warmup_s=0.3, min_cosine=-1, progress=TerminalProgress(),
    )  # fmt: skip
    labels = list(files)
    found = {}
    for number, candidate in enumerate(report.data["candidates"]):
        compared = candidate.get("against_reference") or {}
        ratio = 1.0 if number == 0 else compared.get("ratio", float("nan"))
        found[labels[number // len(DEVICES)], candidate["device"]] = ratio
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="timed, a candidate and round")
    parser.add_argument("--static", metavar="JSON", action="append", default=[], help="fields of StaticConfig")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    machine = inspect_machine()
    print(machine)
    figures = []
    for name in options.names or NAMES:
        with tempfile.TemporaryDirectory(prefix="quantized-") as scratch:
            folder = Path(scratch)
            files, missing = make_files(name, folder, options.static)
            test = dict(np.load(folder / "test.npz"))
            ratio = speeds(files, folder, options.rounds, options.seconds)
            print(f"\n{name}: {len(test['labels'])} test samples")
            print(f"{'':20} {'MB':>6}  {'metric ORT':>10} {'OpenVINO':>9}  {'speed ORT':>9} {'OpenVINO':>9}")
            for label, file in files.items():
                scores = [evaluate(name, file, device, test) for device in DEVICES]
                fast = [ratio[label, device] for device in DEVICES]
                size = sum(f.stat().st_size for f in file.parent.glob(f"{file.name}*")) / 1e6
                print(f"{label:20} {size:6.2f}  {scores[0]:10.4f} {scores[1]:9.4f}  {fast[0]:9.2f} {fast[1]:9.2f}")
                figures.append({"model": name, "file": label, "mb": size, "metric": scores, "speed": fast})
            for label, why in missing.items():
                print(f"{label:20} {why}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
