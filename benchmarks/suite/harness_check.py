"""Our harness against a bare loop and benchmark_app: harness_check.py [--model FILE] [--threads N] [--rounds N]

The same model, threads and precision are timed in five ways: our worker on ONNX Runtime and on OpenVINO; a bare loop of
`InferenceSession.run` and of `InferRequest.infer` with nothing of ours imported; and OpenVINO's own `benchmark_app`. A
round starts a fresh process each, which then take turns in random order, as they do in `deploykit benchmark`;
benchmark_app cannot wait for its turn and is started for each. It fills its inputs once, so that all five get
one and the same input from a file, and ours, which rotates through 32 otherwise, gets that one only. It is told to hand
that input over in every run (`-inference_only False`), as the others do. Its clock still runs inside OpenVINO only:
tensors over arrays, the call, and arrays of the results are counted by the other clocks and not by that one. With
caches that the model has emptied that was 0.1 to 0.2 ms a request, which is little of a model of this size.

Printed are the medians of the turns' medians and the median of the ratios within turns (ours to theirs), with a 95 %
bootstrap interval over turns; beside it the same ratio of the shortest latencies, which other load on the machine
moves less. Ends with 1 where a ratio of medians is further than 2 % from 1. Without `--model`, the shape of a
ResNet-18 with random weights is made.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

WITHIN = 0.02
_LEAST_WARMUP, _SETTLE_RUNS = 10, 2
_KINDS = {
    "float32": "f32", "float64": "f64", "float16": "f16", "bool": "bool", "int8": "i8", "uint8": "u8", "int16": "i16",
    "int32": "i32", "int64": "i64",
}  # fmt: skip


def make(path: Path, size: int) -> None:
    """Write a ResNet-18 with one fixed input, from transformers."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")
    torch.onnx.export(
        ResNetForImageClassification(config).eval(), (torch.randn(1, 3, size, size),), str(path), dynamo=False,
        opset_version=17, input_names=["x"], output_names=["logits"],
    )  # fmt: skip


def draw(model: Path) -> dict[str, Any]:
    """One input for a model; dynamic dimensions become 1."""
    import onnx

    initial = onnx.load(str(model), load_external_data=False).graph
    weights = {tensor.name for tensor in initial.initializer}
    rng = np.random.default_rng(0)
    feeds = {}
    for value in initial.input:
        if value.name in weights:
            continue
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
        feeds[value.name] = rng.standard_normal(shape).astype(kind) if kind.kind == "f" else np.ones(shape, kind)
    return feeds


# --- one process each ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timed:
    """One way in one round.

    Attributes:
        median_ms: Median latency.
        shortest_ms: The shortest.
    """

    median_ms: float
    shortest_ms: float

    @classmethod
    def of(cls, samples_ns: list[int]) -> Timed:
        """From latencies in nanoseconds."""
        return cls(float(np.median(samples_ns)) / 1e6, min(samples_ns) / 1e6)


def serve(run: Any, warmup_s: float) -> None:
    """A plain loop, after the same warm-up as ours: seconds come in on a line, latencies in nanoseconds go out."""
    clock = time.perf_counter_ns
    end, runs = clock() + int(warmup_s * 1e9), 0
    while runs < _LEAST_WARMUP or clock() < end:
        run()
        runs += 1
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(_SETTLE_RUNS):
            run()
        found = []
        end = clock() + int(float(line) * 1e9)
        while clock() < end:
            begun = clock()
            run()
            found.append(clock() - begun)
        print(json.dumps(found), flush=True)


def bare(runtime: str, folder: Path, threads: int, warmup_s: float) -> None:
    """The runtime alone, in this process."""
    with np.load(folder / "feeds.npz") as archive:
        feeds = {key.partition("/")[2]: archive[key] for key in archive.files}
    if runtime == "ort":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        serve(lambda: session.run(None, feeds), warmup_s)
        return
    import openvino

    config = {
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    request = openvino.Core().compile_model(str(folder / "model.onnx"), "CPU", config).create_infer_request()
    serve(lambda: request.infer(feeds), warmup_s)


class Ours:
    """Our worker, as `deploykit benchmark` starts it."""

    def __init__(self, device: str, folder: Path, threads: int, warmup_s: float) -> None:
        from deploykit.benchmarks import Candidate, Settings
        from deploykit.benchmarks.process import Process

        candidate = Candidate("model", str(folder / "model.onnx"), device, "", 0)
        self._child = Process(candidate, Settings(threads=threads), folder)
        self._child.ask("warm", seconds=warmup_s)

    def turn(self, seconds: float) -> Timed:
        """Latencies of one turn."""
        return Timed.of(self._child.ask("time", seconds=seconds)["samples_ns"])

    def close(self) -> None:
        """End the process."""
        self._child.kill()


class Bare:
    """A runtime alone."""

    def __init__(self, runtime: str, folder: Path, threads: int, warmup_s: float) -> None:
        command = [sys.executable, __file__, "--child", runtime, str(folder), str(threads), str(warmup_s)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != "ready\n":
            raise RuntimeError(f"the bare loop of {runtime} did not start")

    def _line(self) -> str:
        assert self._child.stdout is not None
        return self._child.stdout.readline()

    def turn(self, seconds: float) -> Timed:
        """Latencies of one turn."""
        assert self._child.stdin is not None
        self._child.stdin.write(f"{seconds}\n")
        self._child.stdin.flush()
        return Timed.of(json.loads(self._line()))

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.communicate()


class App:
    """benchmark_app, started for every turn."""

    def __init__(self, program: str, folder: Path, threads: int) -> None:
        self._arguments = program, folder, threads

    def turn(self, seconds: float) -> Timed:
        """What it printed."""
        return benchmark_app(*self._arguments, seconds)

    def close(self) -> None:
        """Nothing runs between turns."""


def benchmark_app(program: str, folder: Path, threads: int, seconds: float) -> Timed:
    """OpenVINO's tool, by what it prints; it warms up with one run."""
    inputs = sorted(folder.glob("input_*.npy"))
    names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    given = ",".join(f"{name}:{path}" for name, path in zip(names, inputs, strict=True))
    # Left to itself, it would take what looks like an image for bytes, and put a conversion before the model.
    kinds = ",".join(f"{name}:{_KINDS[str(np.load(path).dtype)]}" for name, path in zip(names, inputs, strict=True))
    text = spawn([
        program, "-m", str(folder / "model.onnx"), "-d", "CPU", "-hint", "none", "-nstreams", "1", "-nireq", "1",
        "-nthreads", str(threads), "-api", "sync", "-t", str(max(1, round(seconds))), "-infer_precision", "f32",
        "-i", given, "-iop", kinds, "-inference_only", "False",
    ])  # fmt: skip
    return Timed(printed(text, "Median"), printed(text, "Min"))


def printed(text: str, word: str) -> float:
    """A latency that benchmark_app printed, in milliseconds; of short ones it prints microseconds."""
    found = re.search(rf"{word}:\s*([\d.]+) (ms|us)", text)
    if found is None:
        raise RuntimeError(f"benchmark_app printed no {word}: {text[-300:]}")
    return float(found.group(1)) / {"ms": 1, "us": 1e3}[found.group(2)]


def spawn(command: list[str]) -> str:
    """Run to the end, and return what was printed."""
    home = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(
            f"{Path(command[0]).name} ended with {done.returncode}: {(done.stderr + done.stdout).strip()[-300:]}"
        )
    return done.stdout


# --- all of them -----------------------------------------------------------------------------------------------------


def interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """95 % bootstrap of the median over rounds."""
    rng = np.random.default_rng(0)
    draws = np.median(rng.choice(values, (10_000, len(values))), axis=1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def rounds_of(ways: dict[str, Any], rounds: int, turns: int, seconds: float, seed: int) -> dict[str, list[Timed]]:
    """Every way in fresh processes once a round; in each turn all of them in random order."""
    order = random.Random(seed)
    found: dict[str, list[Timed]] = {name: [] for name in ways}
    for number in range(rounds):
        live: dict[str, Any] = {}
        try:
            for name in order.sample(list(ways), len(ways)):
                live[name] = ways[name]()
            for _ in range(turns):
                for name in order.sample(list(ways), len(ways)):
                    found[name].append(live[name].turn(seconds))
        finally:
            for way in live.values():
                way.close()
        latest = ", ".join(f"{name} {times[-1].median_ms:.3f} ms" for name, times in found.items())
        print(f"round {number + 1} of {rounds}: {latest}", file=sys.stderr, flush=True)
    return found


def table(found: dict[str, list[Timed]]) -> list[dict[str, Any]]:
    """Ours against each of theirs."""
    pairs = [
        ("our worker, ort:cpu", "bare loop, onnxruntime"),
        ("our worker, openvino:cpu", "bare loop, openvino"),
        ("our worker, openvino:cpu", "benchmark_app"),
    ]
    rows = []
    for mine, theirs in pairs:
        if mine not in found or theirs not in found:
            continue
        medians = [np.array([t.median_ms for t in found[name]]) for name in (mine, theirs)]
        shortest = [np.array([t.shortest_ms for t in found[name]]) for name in (mine, theirs)]
        ratios = medians[0] / medians[1]
        low, high = interval(ratios)
        rows.append({
            "ours": mine, "theirs": theirs, "ours_ms": float(np.median(medians[0])),
            "theirs_ms": float(np.median(medians[1])), "ratio": float(np.median(ratios)), "low": low, "high": high,
            "shortest_ratio": float(np.median(shortest[0] / shortest[1])),
            "within": bool(abs(np.median(ratios) - 1) <= WITHIN),
        })  # fmt: skip
    return rows


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """The model, and one input in the forms that all of them read."""
    if options.model is None:
        # Not in this process: what torch starts would go on running beside the measurements.
        spawn([sys.executable, __file__, "--child", "make", str(folder), str(options.size), "0"])
    else:
        shutil.copy(options.model, folder / "model.onnx")
        for data in options.model.parent.glob(options.model.name + "*data"):
            shutil.copy(data, folder)
    feeds = draw(folder / "model.onnx")
    np.savez(folder / "feeds.npz", **{f"0/{name}": array for name, array in feeds.items()})
    for number, array in enumerate(feeds.values()):
        np.save(folder / f"input_{number:03}.npy", array)
    (folder / "names.json").write_text(json.dumps(list(feeds)), encoding="utf-8")


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="An .onnx file; dynamic dimensions become 1.")
    parser.add_argument("--size", type=int, default=224, help="Of the images for the ResNet-18.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=6, help="In each round.")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="Timed a way and turn; benchmark_app takes 1 at least."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--warmup", type=float, default=1.0, help="Seconds before, and at least 10 runs.")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, child_folder, number, warmup = options.child
        if what == "make":
            make(Path(child_folder) / "model.onnx", int(number))
        else:
            bare(what, Path(child_folder), int(number), float(warmup))
        return 0
    with tempfile.TemporaryDirectory(prefix="harness-") as name:
        folder = Path(name)
        prepare(folder, options)
        own = folder, options.threads
        ways: dict[str, Any] = {
            "our worker, ort:cpu": lambda: Ours("ort:cpu", *own, options.warmup),
            "bare loop, onnxruntime": lambda: Bare("ort", *own, options.warmup),
            "our worker, openvino:cpu": lambda: Ours("openvino:cpu", *own, options.warmup),
            "bare loop, openvino": lambda: Bare("openvino", *own, options.warmup),
        }
        program = shutil.which("benchmark_app", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
        if program is None:
            print("benchmark_app is not installed: it comes with the openvino wheel", file=sys.stderr)
        else:
            ways["benchmark_app"] = lambda: App(program, *own)
        found = rounds_of(ways, options.rounds, options.turns, options.seconds, options.seed)
    rows = table(found)
    print(
        f"{options.rounds} rounds of {options.turns} turns of {options.seconds:g} s, {options.threads} threads, "
        "one input for all"
    )
    for row in rows:
        print(
            f"{row['ours']:25} {row['ours_ms']:8.3f} ms  to {row['theirs']:23} {row['theirs_ms']:8.3f} ms: "
            f"{row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}], shortest {row['shortest_ratio']:.4f}  "
            f"{'within' if row['within'] else 'NOT within'} {WITHIN:.0%}"
        )
    if options.json:
        raw = {name: [asdict(one) for one in times] for name, times in found.items()}
        options.json.write_text(json.dumps({"rows": rows, "turns": raw}, indent=1) + "\n")
    return 0 if len(rows) == 3 and all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
