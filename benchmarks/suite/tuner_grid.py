"""The tuner against the whole grid: python benchmarks/suite/tuner_grid.py [NAME ...] [--objective O ...] [--seconds S]

For every model and objective each combination of the settings that the tuner knows for ONNX Runtime's CPU provider is
measured in a process of its own; then the tuner has a fifth of the time that this took. In the end the tuner's choice
and the grid's best are measured side by side, in turns: how much slower is the choice, whatever luck made the grid's
best look so good?
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from quantized_shapes import network as shape

from deploykit.benchmarks import Candidate, Settings
from deploykit.benchmarks.arena import ProcessArena
from deploykit.benchmarks.tuner import search
from deploykit.benchmarks.tuner_space import Config, Stage, stages_for
from deploykit.machine import allowed_cores, inspect_machine
from deploykit.models import benchmark_feeds, load_model

NAMES = ("mobilenetv2", "vit-tiny", "convnet")
TURN_S, TURNS = 0.25, 40


def make(name: str, folder: Path) -> Path:
    """The model's file; random weights serve for speed."""
    path = folder / f"{name}.onnx"
    if name == "convnet":
        from verdicts import network as small

        return small(path, longer=False)
    import torch

    module, example = shape(name)
    torch.onnx.export(
        module, (example[:1],), str(path), dynamo=False, opset_version=17, input_names=["x"], output_names=["y"],
        dynamic_axes={"x": {0: "batch"}},
    )  # fmt: skip
    return path


def grid_of(base: Config, stages: Sequence[Stage]) -> list[Config]:
    """Every combination of all stages' choices."""
    found = [base]
    for stage in stages:
        found = list(dict.fromkeys(itertools.chain.from_iterable(stage.around(config) for config in found)))
    return found


def whole_grid(arena: ProcessArena, configs: Sequence[Config], seconds: float) -> dict[Config, float]:
    """Nanoseconds a sample of every configuration, one after the other."""
    paces = {}
    for config in configs:
        if not arena.load([config]):
            arena.turn(config, 1.0)
            paces[config] = arena.turn(config, seconds)
        arena.drop([config])
    return paces


def side_by_side(arena: ProcessArena, first: Config, second: Config) -> tuple[float, float]:
    """How many times slower the second is, with its standard error, over turns."""
    arena.load([first, second])
    logs = []
    for turn in range(TURNS):
        pair = (first, second) if turn % 2 else (second, first)
        pace = {config: arena.turn(config, TURN_S) for config in pair}
        logs.append(np.log(pace[second] / pace[first]))
    arena.drop([first, second])
    return float(np.exp(np.mean(logs))), float(np.std(logs, ddof=1) / np.sqrt(TURNS))


def compare(name: str, objective: str, seconds: float) -> dict[str, Any]:
    """One model and objective."""
    with tempfile.TemporaryDirectory(prefix="grid-") as folder_name:
        folder = Path(folder_name)
        model = load_model(make(name, folder))
        candidate = Candidate(name, str(model.path), "ort:cpu", model.digest, model.size_bytes)
        stages = stages_for("ort:cpu", objective, inspect_machine(), native=False, batches=False)
        stages = [stage for stage in stages if not stage.risky]
        base = Config(allowed_cores())
        by_wall = objective == "throughput"
        with ProcessArena(
            candidate, Settings(), lambda n: benchmark_feeds(model, None, n, {})[0], folder, by_wall=by_wall
        ) as arena:
            began = time.monotonic()
            paces = whole_grid(arena, grid_of(base, stages), seconds)
            spent = time.monotonic() - began
            best = min(paces, key=lambda c: paces[c])
            tuned = search(base, stages, arena, spent / 5)
            slower, error = (1.0, 0.0) if best == tuned.chosen else side_by_side(arena, best, tuned.chosen)
            default = 1.0 if base == best else slower
            if base not in (best, tuned.chosen):
                default, _ = side_by_side(arena, best, base)
    return {
        "model": name, "objective": objective, "grid": len(paces), "grid_s": spent, "tuner_s": tuned.spent_s,
        "best": best.label, "chosen": tuned.chosen.label, "slower": slower, "error": error, "default": default,
    }  # fmt: skip


def main() -> None:
    """Print a line a model and objective."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=", ".join(NAMES))
    parser.add_argument("--objective", nargs="*", default=["latency", "throughput"])
    parser.add_argument("--seconds", type=float, default=5.0, help="timed, a configuration of the grid")
    options = parser.parse_args()
    print(inspect_machine().cpu, allowed_cores(), "cores")
    for name in options.names or NAMES:
        for objective in options.objective:
            found = compare(name, objective, options.seconds)
            print(
                f"{name} {objective}: grid of {found['grid']} in {found['grid_s']:.0f} s, best: {found['best']}; tuner "
                f"in {found['tuner_s']:.0f} s ({found['tuner_s'] / found['grid_s']:.0%}): {found['chosen']}, "
                f"{found['slower'] - 1:+.1%} (standard error {found['error']:.1%}) against the best; "
                f"the defaults {found['default'] - 1:+.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
