"""ONNX's reference evaluator as a runtime, `reference:cpu`: slow, in numpy, and what the standard says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from deploykit.errors import DeploykitError, DeviceError, InferenceError, first_line
from deploykit.modelfile import check_model, read_model, signature_of
from deploykit.runtimes import Bound, Device, ExecutedNode, NodePlacement, Placement, Session, SessionOptions
from deploykit.specs import Array, Feeds, fit_feeds

_ON = "numpy"


class ReferenceSession(Session):
    """A model in the reference evaluator.

    Numpy chooses its own threads, so `SessionOptions.threads` has no effect; the graph is run as it is.

    Args:
        path: The `.onnx` file.
        device: "reference:cpu".
        options: It takes no settings.
    """

    def __init__(self, path: Path, device: Device, options: SessionOptions) -> None:
        import onnx
        from onnx.reference import ReferenceEvaluator

        for key in options.extra or {}:
            raise DeviceError(f"{device} has no setting {key!r}", expected="none")
        if isinstance(options.optimize, str):
            raise DeviceError(f"{device} never optimizes a graph: optimize {options.optimize!r}")
        model = read_model(path)
        check_model(model, path)
        self.device = device
        self.settings = {"evaluator": f"onnx {onnx.__version__}"}
        self.signature = signature_of(model)
        self._path = path
        try:
            self._evaluator: Any = ReferenceEvaluator(model)
        except Exception as exc:
            raise InferenceError(f"the reference evaluator cannot load {path} ({first_line(exc)})") from exc

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        found = self._evaluate(self._checked(feeds))
        # An output may be an input or a weight itself; the caller may write into what it is given.
        return {spec.name: np.array(found[spec.name]) for spec in self.signature.outputs}

    def _checked(self, feeds: Feeds) -> Mapping[str, Array]:
        """The evaluator broadcasts what does not fit, so that shapes and types are looked at before.

        Raises:
            DataError: A name is missing, or a shape does not fit.
            TypeError: A dtype is another; `Session` says it in its words.
        """
        if self._evaluator is None:
            raise RuntimeError("the session is closed")
        if len(feeds) != len(self.signature.inputs):
            raise KeyError("one array an input")
        for name, array in fit_feeds(self.signature, feeds).items():
            if array.dtype != feeds[name].dtype:
                raise TypeError(f"dtype of {name}")
        return feeds

    def _evaluate(self, feeds: Feeds, watch: Callable[[int, int, Any, Any], None] | None = None) -> dict[str, Array]:
        """Run node by node, as the evaluator does it itself, and tell each node's time in ns, inputs and outputs."""
        known: dict[str, Any] = {"": None, **self._evaluator.rt_inits_, **feeds}
        for number, node in enumerate(self._evaluator.rt_nodes_):
            given = [known[name] for name in node.input]
            started = time.perf_counter_ns()
            made = node.run(*given, context=known) if node.need_context() else node.run(*given)
            spent = time.perf_counter_ns() - started
            known.update(zip(node.output, made, strict=False))
            if watch is not None:
                watch(number, spent, given, made)
        return known

    def _request(self) -> Callable[[Feeds], dict[str, Array]]:
        return self._run

    def _bind(self, feeds: Feeds) -> Bound:
        latest: dict[str, Array] = {}

        def run() -> None:
            latest.update(self._run(feeds))

        run()
        return Bound(self, feeds, run, lambda: {name: array.copy() for name, array in latest.items()})

    def _translate(self, exc: Exception) -> Exception:
        if isinstance(exc, DeploykitError):
            return exc
        return InferenceError(f"the reference evaluator failed while it ran {self._path} ({first_line(exc)})")

    def _placement(self, feeds: Feeds, runs: int) -> Placement:
        times: dict[int, list[int]] = {}
        seen: dict[int, tuple[str, int]] = {}

        def watch(number: int, spent: int, given: Any, made: Any) -> None:
            times.setdefault(number, []).append(spent)
            arrays = [a for a in (*given, *made) if isinstance(a, np.ndarray)]
            kind = next((a.dtype.name for a in made if isinstance(a, np.ndarray)), "")
            seen[number] = kind, sum(a.nbytes for a in arrays)

        for _ in range(runs):
            self._evaluate(self._checked(feeds), watch)
        graph = self._evaluator.onnx_graph_.node
        nodes = [
            NodePlacement(
                _name(number, graph[number]), graph[number].op_type, _ON, kind, median(times[number]) / 1e3, size
            )
            for number, (kind, size) in seen.items()
        ]
        return Placement(_ON, tuple(nodes))

    def _executed(self) -> tuple[ExecutedNode, ...]:
        return tuple(
            ExecutedNode(_name(i, node), node.op_type, "", frozenset({node.name, *node.input, *node.output} - {""}))
            for i, node in enumerate(self._evaluator.onnx_graph_.node)
        )

    def close(self) -> None:
        """Free the model."""
        self._evaluator = None


def _name(number: int, node: Any) -> str:
    return str(node.name) or f"{node.op_type}_{number}"


class ReferenceRuntime:
    """What the entry point names."""

    reads = (".onnx",)
    concurrent = True

    def check(self, target: str) -> None:
        """There is one target.

        Raises:
            DeviceError: It is another.
        """
        if target != "cpu":
            raise DeviceError(f"the reference evaluator has no device {target!r}", expected="reference:cpu")

    def open(self, path: Path, device: Device, options: SessionOptions) -> Session:
        """Load a model.

        Raises:
            DeviceError: Settings, of which it has none.
            ModelError: The file is corrupt or unsafe.
            InferenceError: An operator has no reference implementation.
        """
        return ReferenceSession(path, device, options)


runtime = ReferenceRuntime()
