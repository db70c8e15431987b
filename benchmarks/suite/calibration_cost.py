"""What calibration costs: python benchmarks/suite/calibration_cost.py [--images N ...] [--theirs METHOD ...]

ResNet-50 (its shape; random weights serve for cost) over random images, in ONNX Runtime on the CPU. Every row is a
process of its own: plain float32 inference over the same images, the calibration by DeployKit alone, and onnxruntime's
calibrators where `--theirs` names them (entropy and percentile keep every activation: 64 images take 7.6 GB). Printed
are seconds, their ratio to plain inference in the same round, and the peak of the process's resident memory, medians
over rounds. The model and the images are on disk before; loading the model is not counted, reading images is.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_BATCH = 8
_IMAGE = (3, 224, 224)
_MEMORY_GUARD = 14 << 30


def make(folder: Path) -> None:
    """Write the model: from transformers, batch statistics from noise."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig()).train()
    with torch.no_grad():
        model(torch.randn(8, 3, 224, 224))
    torch.onnx.export(
        model.eval(), (torch.randn(1, 3, 224, 224),), str(folder / "model.onnx"), dynamo=False, opset_version=17,
        dynamic_axes={"x": {0: "batch"}}, input_names=["x"],
    )  # fmt: skip


def draw(path: Path, count: int) -> None:
    """Write images."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(count):
            file.write(rng.standard_normal(_IMAGE, np.float32).tobytes())


def batches(model: Path, count: int) -> Iterator[dict[str, Any]]:
    """Images, read as they are asked for."""
    with model.with_name("images").open("rb") as file:
        for start in range(0, count, _BATCH):
            size = min(_BATCH, count - start)
            yield {"x": np.fromfile(file, np.float32, size * math.prod(_IMAGE)).reshape(size, *_IMAGE)}


def plain(model: Path, count: int) -> float:
    """Seconds of float32 inference."""
    from deploykit.runtimes import open_session

    with open_session(model, "ort:cpu") as session:
        session.run(next(batches(model, _BATCH)))
        start = time.perf_counter()
        for feeds in batches(model, count):
            session.run(feeds)
        return time.perf_counter() - start


def ours(model: Path, count: int, method: str) -> float:
    """Seconds of our calibration, ranges included."""
    from deploykit.optimizers.calibration import calibrate
    from deploykit.optimizers.prepare import infer_shapes, prepare
    from deploykit.optimizers.rewrite import rewrite
    from deploykit.optimizers.select_nodes import select_nodes, stand_ins, watched_tensors
    from deploykit.weights import LightModel, open_light

    with tempfile.TemporaryDirectory() as scratch:
        light = open_light(model, Path(scratch))
        prepared, _ = prepare(light.proto)
        rewrite(prepared)
        light = LightModel(infer_shapes(prepared), light.folder)
        del prepared
        nodes = frozenset(select_nodes(light.proto))
        serves = stand_ins(light.proto, nodes)
        tensors = [*dict.fromkeys(serves.get(t, t) for t in watched_tensors(light.proto, nodes))]
        opener = _Opener()
        seen = calibrate(
            light, tensors, batches(model, count), opener, Path(scratch), counted=method != "minmax", divisible=True
        )
        seen.ranges(method, 99.99)
        return time.perf_counter() - opener.ready


class _Opener:
    """As `deploykit quantize` opens models; `ready` is when the last was loaded."""

    ready = 0.0

    def __call__(self, path: Path) -> Any:
        return self._open(path, None).run

    def shared(self, path: Path) -> Any:
        return self._open(path, 1).reusing()

    def _open(self, path: Path, threads: int | None) -> Any:
        from deploykit.runtimes import open_session

        session = open_session(path, "ort:cpu", threads=threads)
        self.ready = time.perf_counter()
        return session


def theirs(model: Path, count: int, method: str) -> float:
    """Seconds of onnxruntime's calibrator."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_GUARD, _MEMORY_GUARD))
    methods = {
        "minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }  # fmt: skip

    class Reader:
        def __init__(self) -> None:
            self.source = batches(model, count)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.source, None)

    with tempfile.TemporaryDirectory() as scratch:
        made = create_calibrator(
            model, ["Conv", "Gemm", "Add"], str(Path(scratch) / "augmented.onnx"), calibrate_method=methods[method]
        )
        start = time.perf_counter()
        made.collect_data(Reader())
        made.compute_data()
        return time.perf_counter() - start


def child(model: Path, what: str, method: str, count: int) -> None:
    """Measure one thing and print it."""
    run = {"plain": lambda: plain(model, count), "ours": lambda: ours(model, count, method)}
    seconds = run.get(what, lambda: theirs(model, count, method))()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


def measure(model: Path, what: str, method: str, count: int) -> dict[str, float] | str:
    """The same in a process of its own; what went wrong where it fails."""
    command = [sys.executable, __file__, "--child", str(model), what, method, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:120]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--methods", nargs="+", default=["minmax", "percentile", "entropy", "mse"])
    parser.add_argument("--theirs", nargs="*", default=[], help="minmax, entropy, percentile; with the first --images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, what, method, count = options.child
        if what == "make":
            make(Path(path))
        else:
            child(Path(path), what, method, int(count))
        return 0
    with tempfile.TemporaryDirectory(prefix="calibration-") as folder:
        # Not in this process: what it holds would count as the peak of every child.
        subprocess.run(
            [sys.executable, __file__, "--child", folder, "make", "", "0"], check=True, stderr=subprocess.DEVNULL
        )
        model = Path(folder) / "model.onnx"
        draw(model.with_name("images"), max(options.images))
        print(f"{'images':>6} {'calibration':24} {'seconds':>8} {'of plain':>9} {'peak MB':>8}")
        for number, count in enumerate(options.images):
            rows = [("plain", "inference"), *(("ours", m) for m in options.methods)]
            rows += [("theirs", m) for m in options.theirs] if number == 0 else []
            found: dict[tuple[str, str], list[Any]] = {row: [] for row in rows}
            for _ in range(options.rounds):
                for row in rows:
                    found[row].append(measure(model, *row, count))
            for row, results in found.items():
                label = f"{'onnxruntime' if row[0] == 'theirs' else 'deploykit' if row[0] == 'ours' else ''} {row[1]}"
                failed = next((r for r in results if isinstance(r, str)), None)
                if failed is not None:
                    print(f"{count:6} {label.strip():24} {failed}")
                    continue
                ratio = statistics.median(
                    r["seconds"] / p["seconds"] for r, p in zip(results, found["plain", "inference"], strict=True)
                )
                seconds = statistics.median(r["seconds"] for r in results)
                peak = max(r["peak_mb"] for r in results)
                print(f"{count:6} {label.strip():24} {seconds:8.2f} {ratio:9.2f} {peak:8.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
