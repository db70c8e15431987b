"""Device names, and what every runtime's session can do."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from deploykit.errors import DataError, DeviceError
from deploykit.extras import require
from deploykit.plugins import find, names
from deploykit.runtimes.requests import Bound, Request
from deploykit.specs import Array, Feeds, Signature, TensorSpec, fit_feeds

if TYPE_CHECKING:
    from deploykit.runtimes.plugged import Runtime

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
# PyTorch as a baseline: operator by operator, and through torch.compile.
TORCH_RUNTIMES = ("torch", "torch-compile")
OWN_RUNTIMES = ("ort", "openvino", *TORCH_RUNTIMES)
_TORCH_TARGET = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model runs.

    Attributes:
        runtime: "ort", "openvino", "torch" or "torch-compile", or the name of a plugin.
        target: ONNX Runtime: the execution provider's full name. OpenVINO: its device ("CPU", "GPU.1", "AUTO").
            PyTorch: its device ("cpu", "cuda", "cuda:1"). A plugin: whatever it calls so.
    """

    runtime: str
    target: str

    def __str__(self) -> str:
        if self.runtime == "ort":
            short = {full: name for name, full in ORT_PROVIDERS.items()}
            return f"ort:{short.get(self.target, self.target)}"
        return f"{self.runtime}:{self.target.lower()}"

    @property
    def reads(self) -> tuple[str, ...]:
        """Suffixes of the model files that its runtime reads."""
        if self.runtime in TORCH_RUNTIMES:
            return (".pt2",)
        if self.runtime not in OWN_RUNTIMES:
            return _plugged(self).reads
        return (".onnx",) if self.runtime == "ort" else (".onnx", ".xml")

    @property
    def on_cpu(self) -> bool:
        """Whether it is the processor, in any of our own runtimes."""
        if self.runtime == "ort":
            return self.target in (ORT_PROVIDERS["cpu"], ORT_PROVIDERS["xnnpack"])
        return self.runtime in OWN_RUNTIMES and self.target.lower() == "cpu"

    @property
    def concurrent(self) -> bool:
        """Whether several threads may run one session at once."""
        if self.runtime not in OWN_RUNTIMES:
            return _plugged(self).concurrent
        return self.target == ORT_PROVIDERS["cpu"]


def _plugged(device: Device) -> Runtime:
    from deploykit.runtimes.plugged import plugged

    return plugged(device)[1]


def parse_device(text: str | Device) -> Device:
    """Read a device name: `ort:cpu`, `ort:CUDAExecutionProvider`, `CUDAExecutionProvider`, `openvino:gpu`, `torch:cpu`.

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
    elif lower and ((runtime in TORCH_RUNTIMES and _TORCH_TARGET.fullmatch(lower)) or find("runtimes", runtime)):
        return Device(runtime, lower)
    others = "".join(f"{name}:TARGET, " for name in names("runtimes"))
    raise DeviceError(
        f"unknown device {text!r}",
        expected=f"ort:{{{'|'.join(ORT_PROVIDERS)}}}, openvino:{{cpu|gpu|npu|auto}}, torch:{{cpu|cuda}}, "
        f"torch-compile:{{cpu|cuda}}, {others}or a provider's full name",
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
        moved_bytes: Size of its inputs, weights and outputs; 0 where the runtime does not say.
        weight_bytes: The part of it that is weights; 0 too where the runtime packed them away and lists them no more.
    """

    name: str
    op: str
    on: str
    precision: str
    time_us: float
    moved_bytes: int = 0
    weight_bytes: int = 0


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


# PyTorch's names for them; "linear" alone is also in ONNX Runtime's QLinearAdd.
_TORCH_COMPUTE = ("aten::linear", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")


def is_compute(op: str) -> bool:
    """Whether an operator does the arithmetic that quantization is about."""
    lower = op.lower()
    if lower.startswith(_TORCH_COMPUTE):
        return True
    return any(word in lower for word in _COMPUTE) and lower not in ("convert",)


# Operators that take a part of a tensor, or only its shape; the rest of it stays where it is.
_PICKS = ("gather", "embedlayernorm", "slice", "stridedslice", "shape", "size", "aten::embedding")


def traffic_bytes(op: str, inputs: Iterable[int], outputs: Iterable[int]) -> int:
    """What an operator reads and writes, given the sizes of its tensors.

    Of an embedding's table, for example, it is the rows that are looked up.
    """
    written = sum(outputs)
    picks = op.lower().startswith(_PICKS)
    return written + sum(min(size, written) if picks else size for size in inputs)


def dtypes_of(specs: Iterable[TensorSpec]) -> tuple[tuple[str, np.dtype[Any] | None], ...]:
    """Name and numpy's dtype of every tensor, to compare with; None for strings, which numpy has many of."""
    found: list[tuple[str, np.dtype[Any] | None]] = []
    for spec in specs:
        if spec.dtype == "bfloat16":
            found.append((spec.name, np.dtype(require("ml_dtypes").bfloat16)))
        else:
            found.append((spec.name, None if spec.dtype == "string" else np.dtype(spec.dtype)))
    return tuple(found)


def check_dtypes(expected: Iterable[tuple[str, np.dtype[Any] | None]], feeds: Feeds) -> None:
    """Refuse what a runtime would convert in silence, or read as it lies there, whatever the byte order says.

    Raises:
        TypeError: An array is of another dtype; `Session._diagnose` says it in our words.
        KeyError: One is missing.
    """
    for name, dtype in expected:
        if feeds[name].dtype != dtype and dtype is not None:
            raise TypeError(f"dtype of {name}")


class Session(ABC):
    """A model, loaded and ready. Use as a context manager.

    `run` is not for several threads at once, unless its device is `concurrent`: take one of the `requests` for each.

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
            raise self.reason(feeds, exc) from exc

    def requests(self, count: int) -> tuple[Request, ...]:
        """Independent requests over this one loaded model, each for a thread of its own.

        How many really run side by side is the runtime's matter: any number in ONNX Runtime, whose requests share the
        session's threads; `NUM_STREAMS` in OpenVINO (`settings` of `open_session`), where the others wait; in PyTorch
        they share the process's threads.

        Args:
            count: How many, 1 or more.

        Raises:
            DeviceError: Less than one.
            InferenceError: The runtime failed.
        """
        if count < 1:
            raise DeviceError(f"{count} requests", expected="1 or more")
        try:
            return tuple(Request(self, self._request()) for _ in range(count))
        except Exception as exc:
            raise self._translate(exc) from exc

    def reusing(self) -> Callable[[Feeds], dict[str, Array]] | None:
        """A way to run for any number of threads at once, whose outputs hold only until the same thread runs again.

        It is for who looks at many or large outputs at once, and keeps none of them.

        Returns:
            As `run`, with its errors; None where the device is not `concurrent`.
        """
        if not self.device.concurrent:
            return None
        call = self._reusing()

        def run(feeds: Feeds) -> dict[str, Array]:
            try:
                return call(feeds)
            except Exception as exc:
                raise self.reason(feeds, exc) from exc

        return run

    def bind(self, feeds: Feeds) -> Bound:
        """Put inputs on the device once, and run on them without copies: what the device alone takes.

        Nothing else may use the session while `Bound.run` runs; the arrays have to stay as they are.

        Args:
            feeds: As for `run`; the model runs once, to see that they fit.

        Raises:
            DataError: A name, dtype or shape does not fit.
            InferenceError: The runtime failed.
        """
        self.run(feeds)
        try:
            return self._bind(feeds)
        except Exception as exc:
            raise self.reason(feeds, exc) from exc

    def reason(self, feeds: Feeds, exc: Exception) -> Exception:
        """Our error for what a run failed with; only a failing call pays for the diagnosis.

        Raises:
            DataError: The feeds are to blame.
        """
        self._diagnose(feeds, exc)
        return self._translate(exc)

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
    def _request(self) -> Callable[[Feeds], dict[str, Array]]:
        """What runs the model once, beside others of its kind."""

    def _reusing(self) -> Callable[[Feeds], dict[str, Array]]:
        """What runs for several threads; outputs need not outlive a thread's next run."""
        return self._run

    @abstractmethod
    def _bind(self, feeds: Feeds) -> Bound: ...

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
