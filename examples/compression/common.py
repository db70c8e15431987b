"""What the examples of compression by training share: stages that are commands of deploykit, and one table.

An example describes itself as an `Example` and calls `run`. Every stage is `python -m deploykit ...`, run in the output
folder and printed before. What stands already is not made again, and an interrupted training goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
# A bare checkout has no installed deploykit.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from deploykit.benchmarks.statistics import interval, log_ratios  # noqa: E402
from deploykit.benchmarks.wording import environment_line  # noqa: E402

RUNTIMES = {"ort:cpu": "ONNX Runtime", "openvino:cpu": "OpenVINO"}
# The goal that the verdict is about: times as fast, times as small, and the accuracy that may be lost for it.
FASTER, SMALLER, LOST = 4.0, 8.0, 0.01
REPORT, TABLE, ABOUT, STAGES = "benchmark.json", "table", "example.json", "stages.json"
QUICK = (
    "This was a --quick run, on a small part of the data: it shows that the road is open, and its numbers mean nothing."
)
_SEED = 0


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of deploykit.

    Attributes:
        output: The folder or file that it makes, in the output folder; `-o` is added to the command.
        arguments: What stands after `deploykit`.
        resumes: Whether the command has `--resume`, for the training in OUTPUT.training.
    """

    output: str
    arguments: Sequence[str]
    resumes: bool = False


# Title of a row, and the folder of its artifact: what every example makes.
MODELS = (
    ("baseline fp32", "baseline"),
    ("baseline int8", "baseline-int8"),
    ("pruned fp32", "pruned"),
    ("pruned int8", "pruned-int8"),
    ("distilled fp32", "distilled"),
    ("distilled int8", "distilled-int8"),
)


@dataclass(frozen=True, slots=True)
class Example:
    """What differs between the examples.

    Attributes:
        name: Its folder's name.
        here: Its folder.
        files: Files that are copied into the output folder, so that commands and factories find them there.
        prepare: Writes the data into the output folder, where they are not there yet; told whether it is a quick run.
        stages: The commands up to the last model, told the same.
        models: Title of a row, and the artifact's folder; the first is what the others are compared with.
        test: The held-out test set, as the benchmark reads it.
        benchmark: More options of the benchmark.
        quick_benchmark: The same for a quick run.
        further: Given the output folder, lines of the example's own, which stand below the verdict.
    """

    name: str
    here: Path
    files: Sequence[str]
    prepare: Callable[[Path, bool], None]
    stages: Callable[[bool], Sequence[Stage]]
    models: Sequence[tuple[str, str]]
    test: str
    benchmark: Sequence[str] = ("--rounds", "7", "--seconds", "1", "--warmup", "0.3")
    quick_benchmark: Sequence[str] = ("--rounds", "3", "--seconds", "0.05", "--warmup", "0")
    further: Callable[[Path], Sequence[str]] = lambda output: ()


def run(example: Example, argv: Sequence[str] | None = None) -> None:
    """Do what the command line asks for: all stages and the table, or the table alone.

    Raises:
        SystemExit: A stage failed, or the output folder is not this example's.
    """
    asked = _arguments(example, argv)
    output, started = asked.output.resolve(), time.monotonic()
    _claim(output, example, quick=asked.quick, anew=asked.steps == "table")
    if asked.steps == "all":
        for name in example.files:
            shutil.copy(example.here / name, output / name)
        example.prepare(output, asked.quick)
        for stage in example.stages(asked.quick):
            do(stage, output)
    else:
        missing = [folder for _, folder in example.models if not (output / folder).is_dir()]
        if missing:
            raise SystemExit(f"{output} holds no {missing[0]}: train first, without --steps table")
        for name in (REPORT, f"{REPORT}.partial"):
            (output / name).unlink(missing_ok=True)
    do(_benchmark(example, quick=asked.quick), output)
    text = write_table(example, output, quick=asked.quick)
    print(f"\n{text}\n{output / TABLE}.md, {TABLE}.json; {time.monotonic() - started:.0f} s", flush=True)


def _arguments(example: Example, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train, prune, distill and quantize, and measure all of it in one table. What stands in OUTPUT is "
        "not made again."
    )
    parser.add_argument("output", nargs="?", type=Path, default=Path("build/compression") / example.name)
    parser.add_argument(
        "--quick", action="store_true", help="a small part of the data, few epochs: the numbers mean nothing"
    )
    parser.add_argument(
        "--steps", choices=("all", "table"), default="all", help="table: measure what stands in OUTPUT again"
    )
    return parser.parse_args(argv)


def _claim(output: Path, example: Example, *, quick: bool, anew: bool) -> None:
    """Make the output folder, or see that it is of this example.

    Raises:
        SystemExit: It is not.
    """
    about = {"example": example.name, "quick": quick}
    file = output / ABOUT
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != about:
            kind = f"{found.get('example')} example{', a --quick run' if found.get('quick') else ''}"
            raise SystemExit(f"{output} holds the {kind}; name another folder, or remove it")
        return
    if anew or (output.exists() and any(output.iterdir())):
        raise SystemExit(f"{output} is no output of this example; name another folder")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about) + "\n", encoding="utf-8")


def do(stage: Stage, output: Path) -> None:
    """Run a stage, unless what it makes is there; remember its command and how long it took.

    Raises:
        SystemExit: It failed, or what is there was made by another command.
    """
    made, log = output / stage.output, output / STAGES
    done: dict[str, Any] = json.loads(log.read_text(encoding="utf-8")) if log.is_file() else {}
    command = ["deploykit", *stage.arguments, "-o", stage.output]
    known = done.get(stage.output)
    if made.exists():
        if known is not None and known["command"] != shlex.join(command):
            raise SystemExit(f"{made} was made by another command: {known['command']}\nremove it to make it anew")
        print(f"\n{stage.output} stands already", flush=True)
        return
    goes_on = stage.resumes and _interrupted(made)
    print(f"\n$ python -m {shlex.join([*command, '--resume'] if goes_on else command)}", flush=True)
    started = time.monotonic()
    code = _call([sys.executable, "-m", *command, *(["--resume"] if goes_on else [])], output)
    if code:
        raise SystemExit(f"failed: {shlex.join(command)}\nthe same command goes on from there")
    done[stage.output] = {"command": shlex.join(command), "seconds": round(time.monotonic() - started, 1)}
    log.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


def _interrupted(made: Path) -> bool:
    """Whether an interrupted training, or measurement, stands beside what is to be made."""
    return made.with_name(f"{made.name}.training").is_dir() or made.with_name(f"{made.name}.partial").is_file()


def _call(command: list[str], folder: Path) -> int:
    """Run a command in the output folder, which finds this checkout; an interrupt ends it with its checkpoint."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    before = signal.signal(signal.SIGTERM, _end)
    child = subprocess.Popen(command, cwd=folder, env=env)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.wait()  # a terminal interrupts both: the command is writing its checkpoint
        raise SystemExit("interrupted; the same command goes on from there") from None
    except SystemExit:
        child.terminate()
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: Any) -> None:
    raise SystemExit("ended; the same command goes on from there")


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write a dataset, whole or not at all."""
    partial = path.with_name(f".{path.name}.new.npz")
    np.savez(partial, **arrays)
    partial.replace(path)


# --- the table -------------------------------------------------------------------------------------------------------


def _benchmark(example: Example, *, quick: bool) -> Stage:
    """One interleaved run of all models in both runtimes, which measures the metrics on the test set too.

    Nothing is turned away for its outputs or its accuracy: the table tells.
    """
    models = [part for _, folder in example.models for part in ("-m", folder)]
    devices = [part for device in RUNTIMES for part in ("--device", device)]
    pace = example.quick_benchmark if quick else example.benchmark
    judged = ["--data", example.test, "--min-cosine", "-1", "--max-drop", "1", "--no-confirm"]
    return Stage(REPORT, ["benchmark", *models, *devices, *judged, *pace], resumes=True)


def write_table(example: Example, output: Path, *, quick: bool) -> str:
    """Write `table.json` and `table.md` out of the benchmark's report; the Markdown is given."""
    report = json.loads((output / REPORT).read_text(encoding="utf-8"))
    rows = rows_of(report, example.models)
    stages = json.loads((output / STAGES).read_text(encoding="utf-8")) if (output / STAGES).is_file() else {}
    seconds = {name: found["seconds"] for name, found in stages.items()}
    found = {
        "example": example.name, "quick": quick, "created": report["created"], "deploykit": report["deploykit"],
        "environment": report["environment"], "noise_floor": report["noise_floor"], "test": example.test,
        "goal": {"faster": FASTER, "smaller": SMALLER, "lost": LOST},
        "rows": rows, "verdict": verdict(rows), "further": list(example.further(output)), "seconds": seconds,
    }  # fmt: skip
    text = markdown(found)
    (output / f"{TABLE}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (output / f"{TABLE}.md").write_text(text, encoding="utf-8")
    return text


def rows_of(report: Mapping[str, Any], models: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """One row a model, compared in each runtime with the first model there.

    Args:
        report: Of `deploykit benchmark`.
        models: Title and folder, as they were measured.

    Raises:
        SystemExit: A model was not measured in one of the runtimes.
    """
    entries = {(found["name"], found["device"]): found for found in report["candidates"]}
    rows: list[dict[str, Any]] = []
    for title, folder in models:
        row: dict[str, Any] = {"title": title, "model": folder, "runtimes": {}}
        for device in RUNTIMES:
            found, first = entries[folder, device], entries[models[0][1], device]
            if found["status"] != "ok":
                raise SystemExit(f"{title} ({folder}) was not measured on {device}: {found['status']}")
            row["bytes"] = found["size_bytes"]
            row["runtimes"][device] = {
                **found["accuracy"], "median_ms": found["median_ms"],
                "speed": _speed(first["rounds"], found["rounds"]) if found is not first else None,
            }  # fmt: skip
        row["smaller"] = (rows[0] if rows else row)["bytes"] / row["bytes"]
        rows.append(row)
    return rows


def _speed(reference: Sequence[Mapping[str, Any]], rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How many times as fast, with the 95 % interval over the rounds."""
    middle, low, high = np.exp(interval(log_ratios(reference, rounds), _SEED))
    return {"ratio": float(middle), "low": float(low), "high": float(high)}


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which model reaches the goal in each runtime, and in both; where none does, which comes nearest and why not.

    The lower end of the speed's interval has to reach the goal, not its middle.
    """
    first, others = rows[0], rows[1:]
    lines, reached = [], {}
    for device, name in RUNTIMES.items():
        good = [row for row in others if not _misses(row, first, device)]
        reached[device] = [row["title"] for row in good]
        best = max(good or others, key=lambda row: _nearness(row, first, device))
        told = f"{best['title']}: {_figures(best, first, device)}"
        missed = _misses(best, first, device)
        lines.append(f"{name}: reached by {told}" if good else f"{name}: not reached; nearest is {told}; {missed}")
    everywhere = [row["title"] for row in others if all(row["title"] in titles for titles in reached.values())]
    goal = f"at least {FASTER:g} times faster and {SMALLER:g} times smaller at {100 * LOST:g} point of accuracy or less"
    lines.insert(
        0, f"Goal, {goal}: " + (f"reached in both by {', '.join(everywhere)}" if everywhere else "not reached")
    )
    return {"reached": everywhere, "runtimes": reached, "lines": lines}


def _lost(row: Mapping[str, Any], first: Mapping[str, Any], device: str, metric: str = "accuracy") -> float:
    return float(first["runtimes"][device][metric] - row["runtimes"][device][metric])


def _misses(row: Mapping[str, Any], first: Mapping[str, Any], device: str) -> str:
    """What of the goal a model misses; empty where it reaches it."""
    speed, lost = row["runtimes"][device]["speed"], _lost(row, first, device)
    missed = []
    if speed["low"] < FASTER:
        missed.append(f"{FASTER:g} times faster is missed")
    if row["smaller"] < SMALLER:
        missed.append(f"{SMALLER:g} times smaller is missed")
    if lost > LOST + 1e-9:
        missed.append(f"more than {100 * LOST:g} point is lost")
    return ", ".join(missed)


def _nearness(row: Mapping[str, Any], first: Mapping[str, Any], device: str) -> tuple[bool, float, float]:
    """Accuracy counts first, then how much of the goal is there, then speed."""
    speed = row["runtimes"][device]["speed"]
    share = min(1.0, speed["low"] / FASTER) * min(1.0, row["smaller"] / SMALLER)
    return _lost(row, first, device) <= LOST + 1e-9, share, speed["ratio"]


def _figures(row: Mapping[str, Any], first: Mapping[str, Any], device: str) -> str:
    lost, f1 = (100 * _lost(row, first, device, metric) for metric in ("accuracy", "f1"))
    return (
        f"{_ratio(row['runtimes'][device]['speed'])} faster, {row['smaller']:.1f}x smaller, "
        f"accuracy {-lost:+.2f} points, macro F1 {-f1:+.2f}"
    )


def _ratio(speed: Mapping[str, float]) -> str:
    return f"{speed['ratio']:.2f}x [{speed['low']:.2f}, {speed['high']:.2f}]"


def markdown(found: Mapping[str, Any]) -> str:
    """The table for a person, with its verdict and where it was measured."""
    (ort, ort_name), (openvino, openvino_name) = RUNTIMES.items()
    header = [
        "model", "accuracy", "macro precision", "macro recall", "macro F1", f"accuracy in {openvino_name}",
        f"ms in {ort_name}", "speed", f"ms in {openvino_name}", "speed", "bytes", "smaller",
    ]  # fmt: skip
    cells = []
    for row in found["rows"]:
        one, two = row["runtimes"][ort], row["runtimes"][openvino]
        cells.append(
            [
                row["title"], *(f"{100 * one[name]:.2f} %" for name in ("accuracy", "precision", "recall", "f1")),
                f"{100 * two['accuracy']:.2f} %",
                *(
                    text
                    for side in (one, two)
                    for text in (f"{side['median_ms']:.3f}", _ratio(side["speed"]) if side["speed"] else "1x")
                ),
                f"{row['bytes']:,}", f"{row['smaller']:.1f}x",
            ]
        )  # fmt: skip
    samples = found["rows"][0]["runtimes"][ort]["samples"]
    about = (
        f"Accuracy and macro averages on {samples:,} held-out samples in {ort_name}, on the artifacts; speed against "
        f"{found['rows'][0]['title']} in the same runtime, one request of one sample at a time, all models in one "
        f"interleaved run, with 95 % intervals over its rounds; noise floor {100 * found['noise_floor']:.1f} %."
    )
    lines = [*([f"**{QUICK}**", ""] if found["quick"] else []), *_pipes(header, cells), "", about, ""]
    lines += [f"- {line}" for line in (*found["verdict"]["lines"], *found["further"])]
    where = environment_line(found["environment"])
    lines += ["", f"{found['created'][:10]}, {where}. DeployKit {found['deploykit']}."]
    if found["seconds"]:
        took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["seconds"].items())
        lines += ["", f"{sum(found['seconds'].values()):.0f} s in all: {took}."]
    return "\n".join(lines) + "\n"


def _pipes(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(line)} |" for line in (header, rule, *cells)]
