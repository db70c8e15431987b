"""Device names, and what every runtime's session can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from deploykit.errors import DataError, DeviceError
from deploykit.specs import Array, Feeds, Signature, fit_feeds

# What follows "ort:", and the execution provider that it stands for.
ORT_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "acl": "ACLExecutionProvider",
}
_PROVIDERS_LOWER = {full.lower(): full for full in ORT_PROVIDERS.values()}


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model runs.

    Attributes:
        runtime: "ort" or "openvino".
        target: ONNX Runtime: the execution provider's full name. OpenVINO: its device ("CPU", "GPU.1", "AUTO").
    """

    runtime: str
    target: str

    def __str__(self) -> str:
        if self.runtime == "ort":
            short = {full: name for name, full in ORT_PROVIDERS.items()}
            return f"ort:{short.get(self.target, self.target)}"
        return f"openvino:{self.target.lower()}"

    @property
    def concurrent(self) -> bool:
        """Whether several threads may run one session at once."""
        return self.target == ORT_PROVIDERS["cpu"]


def parse_device(text: str | Device) -> Device:
    """Read a device name: `ort:cpu`, `ort:CUDAExecutionProvider`, `CUDAExecutionProvider`, `openvino:gpu`.

    Raises:
        DeviceError: Not such a name.
    """
    if isinstance(text, Device):
        return text
    runtime, sep, target = text.strip().partition(":")
    runtime, lower = runtime.lower(), target.lower()
    if not sep:
        if runtime in _PROVIDERS_LOWER:
            return Device("ort", _PROVIDERS_LOWER[runtime])
    elif runtime == "ort" and lower:
        if lower in ORT_PROVIDERS:
            return Device("ort", ORT_PROVIDERS[lower])
        if lower in _PROVIDERS_LOWER:
            return Device("ort", _PROVIDERS_LOWER[lower])
        if lower.endswith("executionprovider"):
            return Device("ort", target)
    elif runtime in ("openvino", "ov") and lower:
        return Device("openvino", target.upper())
    raise DeviceError(
        f"unknown device {text!r}",
        expected=f"ort:{{{'|'.join(ORT_PROVIDERS)}}}, openvino:{{cpu|gpu|npu|auto}} or a provider's full name",
        hint="run: deploykit doctor",
    )


@dataclass(frozen=True, slots=True)
class NodePlacement:
    """Where and how one executed node ran.

    Attributes:
        name: The runtime's name for the node, after its fusions.
        op: Operator type after fusion ("QLinearConv", "FullyConnected").
        on: Execution provider or device.
        precision: Element type that the kernel computed in ("float32", "int8", "bfloat16"), "" where unknown.
        time_us: Microseconds in one run; 0 where the runtime does not say.
    """

    name: str
    op: str
    on: str
    precision: str
    time_us: float


@dataclass(frozen=True, slots=True)
class ExecutedNode:
    """One node of the graph that a runtime made of a file, and what of the file went into it.

    Attributes:
        name: The runtime's name for it, the same as in `NodePlacement`.
        op: Operator type after fusion.
        precision: Element type that its kernel computes in ("int8", "float32"), "" where unknown.
        sources: Names of the file's nodes, tensors and weights that it holds, without the runtime's suffixes.
    """

    name: str
    op: str
    precision: str
    sources: frozenset[str]


@dataclass(frozen=True, slots=True)
class Placement:
    """What really ran where."""

    asked: str
    nodes: tuple[NodePlacement, ...]

    @property
    def share_of_nodes(self) -> float:
        """Share of executed nodes on the asked provider, 0 to 1."""
        return sum(n.on == self.asked for n in self.nodes) / len(self.nodes) if self.nodes else 0.0

    @property
    def share_of_time(self) -> float:
        """Share of the nodes' time on the asked provider, 0 to 1."""
        total = sum(n.time_us for n in self.nodes)
        return sum(n.time_us for n in self.nodes if n.on == self.asked) / total if total else self.share_of_nodes

    def precisions(self) -> dict[str, int]:
        """How many nodes that compute (convolutions, matrix products, recurrences) ran in each precision."""
        return dict(Counter(n.precision for n in self.nodes if is_compute(n.op)).most_common())

    def summary(self) -> dict[str, Any]:
        """JSON-ready summary."""
        return {
            "asked": self.asked,
            "nodes": len(self.nodes),
            "share_of_nodes": round(self.share_of_nodes, 4),
            "share_of_time": round(self.share_of_time, 4),
            "compute_precisions": self.precisions(),
            "ops": dict(Counter(n.op for n in self.nodes).most_common()),
        }


_COMPUTE = (
    "conv",
    "matmul",
    "gemm",
    "fullyconnected",
    "lstm",
    "gru",
    "rnn",
    "attention",
    "mha",
    "einsum",
    "deconv",
)


def is_compute(op: str) -> bool:
    """Whether an operator does the arithmetic that quantization is about."""
    lower = op.lower()
    return any(word in lower for word in _COMPUTE) and lower not in ("convert",)


class Session(ABC):
    """A model, loaded and ready. Use as a context manager; `run` is not for several threads at once, unless its device
    is `concurrent`.

    Attributes:
        device: Where it runs.
        signature: Inputs and outputs as the runtime sees them.
        settings: What was set on the runtime, for reports.
    """

    device: Device
    signature: Signature
    settings: dict[str, Any]

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run once.

        Args:
            feeds: An array for every input, of its dtype and rank. Other names are an error.

        Returns:
            An array for every output.

        Raises:
            DataError: A name, dtype or shape does not fit.
            InferenceError: The runtime failed.
        """
        try:
            return self._run(feeds)
        except Exception as exc:
            # Only a failing call pays for the diagnosis.
            self._diagnose(feeds, exc)
            raise self._translate(exc) from exc

    def placement(self, feeds: Feeds, *, runs: int = 1) -> Placement:
        """Run with the runtime's profiler and say which nodes ran where, and in which precision.

        Args:
            feeds: As for `run`.
            runs: How many, after one to warm up; a node's time is the median over them.

        Raises:
            DataError: A name, dtype or shape does not fit.
            InferenceError: The runtime failed.
        """
        self.run(feeds)  # with feeds that do not fit, it says so
        try:
            return self._placement(feeds, runs)
        except Exception as exc:
            raise self._translate(exc) from exc

    def executed(self) -> tuple[ExecutedNode, ...]:
        """The graph that the runtime made of the file: fused, placed, each node with its precision.

        Raises:
            InferenceError: The runtime does not show it.
        """
        try:
            return self._executed()
        except Exception as exc:
            raise self._translate(exc) from exc

    def _diagnose(self, feeds: Feeds, cause: Exception) -> None:
        """Raise a DataError where the feeds are to blame."""
        extra = sorted(set(feeds) - {s.name for s in self.signature.inputs})
        if extra:
            wanted = ", ".join(str(s) for s in self.signature.inputs)
            raise DataError(f"the model has no input {extra[0]!r}", expected=wanted) from cause
        fitted = fit_feeds(self.signature, feeds)
        for spec in self.signature.inputs:
            given = feeds[spec.name]
            if not isinstance(given, np.ndarray):
                raise DataError(
                    f"{spec.name!r} is a {type(given).__name__}, not a numpy array", expected=str(spec)
                ) from cause
            if fitted[spec.name].dtype != given.dtype:
                raise DataError(f"{spec.name!r} is {given.dtype}", expected=str(spec)) from cause

    @abstractmethod
    def _run(self, feeds: Feeds) -> dict[str, Array]: ...

    @abstractmethod
    def _translate(self, exc: Exception) -> Exception:
        """Turn the runtime's exception into one of ours."""

    @abstractmethod
    def _placement(self, feeds: Feeds, runs: int) -> Placement: ...

    @abstractmethod
    def _executed(self) -> tuple[ExecutedNode, ...]: ...

    @abstractmethod
    def close(self) -> None:
        """Free the runtime's memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What may be set on any runtime.

    Attributes:
        threads: Threads inside one request; None for all cores allowed.
        optimize: Whether the runtime may rewrite the graph; for ONNX Runtime also a level: "basic", "extended", "all".
        precision: "fp32" forces single precision for floating-point models (no silent bf16 or TF32); "native" leaves
            the choice to the runtime.
        extra: The runtime's own settings, by their own names.
    """

    threads: int | None = None
    optimize: bool | str = True
    precision: str = "fp32"
    extra: Mapping[str, Any] | None = None
