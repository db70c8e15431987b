"""How often a verdict is right: python benchmarks/suite/verdicts.py [--rounds N] [--seconds S] [--runs N] [--save FILE]

A convolutional network, a copy of it, and a copy with one more convolution that changes nothing and takes about 3 % are
measured together, as `deploykit benchmark --decision` would. Then a hundred measurements are simulated from what was
recorded: each draws as many rounds as the settings ask for, with replacement, and in each round its turns. Counted are
the ties of the network against its copy, and how often the slower one is called slower. `--load FILE` simulates again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploykit.benchmarks import Candidate, Settings, measure
from deploykit.benchmarks.statistics import Outcome, decide, floor_of, log_ratios
from deploykit.machine import inspect_machine
from deploykit.progress import TerminalProgress

CHANNELS, SIZE, LAYERS = 64, 48, 4


def network(path: Path, *, longer: bool) -> Path:
    """Convolutions and ReLUs; `longer` has an identity of 1 x 1 in the end."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for k in range(LAYERS):
        shape = (CHANNELS, 3 if k == 0 else CHANNELS, 3, 3)
        weights.append(numpy_helper.from_array((rng.standard_normal(shape) / 20).astype(np.float32), f"w{k}"))
        nodes.append(helper.make_node("Conv", [last, f"w{k}"], [f"c{k}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{k}"], [f"r{k}"]))
        last = f"r{k}"
    if longer:
        same = np.eye(CHANNELS, dtype=np.float32)[:, :, None, None]
        weights.append(numpy_helper.from_array(same, "same"))
        nodes.append(helper.make_node("Conv", [last, "same"], ["more"]))
        last = "more"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CHANNELS, SIZE, SIZE])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def record(rounds: int, seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Rounds of the network, of the reference's twin, of the copy and of the longer one."""
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)} for _ in range(32)]
    with tempfile.TemporaryDirectory() as name:
        paths = {n: network(Path(name) / f"{n}.onnx", longer=n == "longer") for n in ("network", "copy", "longer")}
        report = measure(
            [Candidate(n, str(p), "ort:cpu", n, p.stat().st_size) for n, p in paths.items()],
            feeds,
            Settings(rounds=rounds, seconds=seconds),
            progress=TerminalProgress(),
        )
    for entry in report.candidates:
        print(f"{entry['name']:8} {entry['median_ms']:.3f} ms  {entry.get('against_reference') or ''}")
    print(f"noise floor {report.data['noise_floor']:.1%}")
    found = {entry["name"]: entry["rounds"] for entry in report.candidates}
    return found | {"twin": report.data["reference_again"]}


def draw(rounds: dict[str, list[dict[str, Any]]], count: int, rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """A measurement of ``count`` rounds; a round's turns are drawn for all candidates alike."""
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in rounds}
    # The network, its twin and its copy are one model; who is who is drawn once, so that what would favour one of the
    # three processes over a whole measurement shows as a false verdict.
    same = ["network", "twin", "copy"]
    names = dict(zip(same, rng.sample(same, 3), strict=True)) | {"longer": "longer"}
    for _ in range(count):
        number = rng.randrange(len(rounds["network"]))
        turns = len(rounds["network"][number]["block_sizes"])
        chosen = [rng.randrange(turns) for _ in range(turns)]
        for name, source in names.items():
            found = rounds[source][number]
            ends = np.cumsum(found["block_sizes"])[:-1]
            blocks = np.split(np.asarray(found["samples_ns"]), ends)
            kept = [blocks[k] for k in chosen]
            made[name].append({"samples_ns": np.concatenate(kept), "block_sizes": [b.size for b in kept]})
    return made


def main() -> None:
    """Record, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=12, help="recorded")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--drawn", type=int, default=10, help="rounds of a simulated measurement")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--load", type=Path)
    options = parser.parse_args()
    print(inspect_machine().cpu)
    rounds = json.loads(options.load.read_text()) if options.load else record(options.rounds, options.seconds)
    if options.save:
        options.save.write_text(json.dumps(rounds))
    rng = random.Random(0)
    ties = found = 0
    ratios = []
    for run in range(options.runs):
        drawn = draw(rounds, options.drawn, rng)
        floor = floor_of(log_ratios(drawn["network"], drawn["twin"]))
        ties += decide(log_ratios(drawn["network"], drawn["copy"]), floor, run).outcome is Outcome.TIE
        slower = decide(log_ratios(drawn["network"], drawn["longer"]), floor, run)
        found += slower.outcome is Outcome.SLOWER
        ratios.append(slower.ratio)
    print(f"{options.runs} simulated measurements of {options.drawn} rounds: against its copy {ties} ties;")
    print(f"the longer one ({1 / np.mean(ratios) - 1:.1%} slower) was called slower {found} times")


if __name__ == "__main__":
    main()
