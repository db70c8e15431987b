"""The test cases that ship with the `onnx` package, and what ONNX Runtime makes of them.

All models are there without a download: node cases are made by code, the light models (AlexNet to VGG) hold constant
weights that are generated inside the graph.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "light")
_DATA = Path(onnx.__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        name: Unique over all kinds.
        kind: One of `KINDS`.
        rtol: The case's own relative tolerance.
        atol: Its absolute tolerance.
        read: Returns the model, and sets of inputs and expected outputs in the model's order.
    """

    name: str
    kind: str
    rtol: float
    atol: float
    read: Callable[[], tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]]


def load_cases(kinds: Sequence[str] = KINDS) -> list[Case]:
    """All cases of some kinds, in a fixed order."""
    cases = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the makers of node cases divide by zero, on purpose
        for kind in kinds:
            found = load_model_tests(kind="real" if kind == "light" else kind)
            cases += [Case(c.name, kind, c.rtol, c.atol, _reader(c, kind)) for c in sorted(found, key=lambda c: c.name)]
    return cases


def _reader(case: Any, kind: str) -> Callable[[], tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]]:
    if kind == "node":
        return lambda: (case.model, [(_arrays(i), _arrays(o)) for i, o in case.data_sets])
    if kind == "light":
        return lambda: _read_light(_DATA / case.url)
    return lambda: _read_folder(Path(case.model_dir))


def _arrays(values: Sequence[Any]) -> list[Any]:
    return [numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else v for v in values]


def _read_folder(folder: Path) -> tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]:
    model = onnx.load(folder / "model.onnx")
    sets = []
    for part in sorted(folder.glob("test_data_set_*")):
        ports = (("input", model.graph.input), ("output", model.graph.output))
        inputs, outputs = (
            [_value(part / f"{word}_{i}.pb", values[i]) for i in range(len(list(part.glob(f"{word}_*.pb"))))]
            for word, values in ports
        )
        sets.append((inputs, outputs))
    return model, sets


def _value(file: Path, declared: onnx.ValueInfoProto) -> Any:
    kinds = {
        "tensor_type": (onnx.TensorProto, numpy_helper.to_array),
        "sequence_type": (onnx.SequenceProto, numpy_helper.to_list),
        "optional_type": (onnx.OptionalProto, numpy_helper.to_optional),
    }
    message, convert = kinds[str(declared.type.WhichOneof("value"))]
    made = message()
    made.ParseFromString(file.read_bytes())
    return convert(made)


def _read_light(path: Path) -> tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]:
    model = onnx.load(path)
    weights = {t.name for t in model.graph.initializer}
    inputs = [Runner.generate_dummy_data(v) for v in model.graph.input if v.name not in weights]
    outputs = []
    for number in range(len(model.graph.output)):
        tensor = onnx.TensorProto()
        tensor.ParseFromString(path.with_name(f"{path.stem}_output_{number}.pb").read_bytes())
        outputs.append(numpy_helper.to_array(tensor))
    return model, [(inputs, outputs)]


def run_case(path: Path, inputs: Sequence[Any]) -> list[Any]:
    """Outputs of ONNX Runtime with its default settings, sequences and optional values included."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {p.name: v for p, v in zip(session.get_inputs(), inputs, strict=False) if v is not None}
    return list(session.run(None, feeds))


def why_wrong(case: Case, path: Path, sets: Sequence[tuple[list[Any], list[Any]]]) -> str:
    """How the outputs of a file differ from those that the case expects; empty where they do not."""
    for inputs, expected in sets:
        try:
            Runner.assert_similar_outputs(expected, run_case(path, inputs), case.rtol, case.atol)
        except Exception as exc:
            lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
            return f"{type(exc).__name__}: {' '.join(lines[:2])[:160]}"
    return ""


def in_processes(
    cases: Sequence[Case], judge: Callable[[Case], dict[str, Any]], start: Callable[[], Any], jobs: int
) -> Iterator[dict[str, Any]]:
    """Judge every case in a few forked processes; one that dies costs its case and is replaced.

    Args:
        cases: What to judge.
        judge: Called with each; returns something that can be pickled.
        start: A context manager for the life of a process.
        jobs: How many processes.

    Yields:
        What `judge` returned, in no order; `{"name": …, "died": exit code}` for the case that a process died of.
    """
    context = multiprocessing.get_context("fork")  # node cases are closures
    shards = {number: list(cases[number::jobs]) for number in range(jobs)}
    running = {}

    def launch(number: int) -> None:
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(shards[number], judge, start, writer), daemon=False)
        process.start()
        writer.close()
        running[reader] = (number, process)

    for number in shards:
        launch(number)
    while running:
        for reader in multiprocessing.connection.wait(list(running)):
            number, process = running[reader]  # type: ignore[index]
            try:
                found = reader.recv()  # type: ignore[union-attr]
            except EOFError:
                process.join()
                del running[reader]  # type: ignore[arg-type]
                if shards[number]:
                    dead = shards[number].pop(0)
                    yield {"name": dead.name, "kind": dead.kind, "died": process.exitcode}
                    launch(number)
                continue
            shards[number].pop(0)
            yield found


def _serve(
    cases: Sequence[Case], judge: Callable[[Case], dict[str, Any]], start: Callable[[], Any], answers: Any
) -> None:
    # What runtimes print about models that they cannot run belongs to no report.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    np.seterr(all="ignore")
    with start():
        for case in cases:
            answers.send(judge(case))
