"""What every kind of source offers to the pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploykit.archives import unsafe_archive
from deploykit.data import ValueRange
from deploykit.errors import SourceError, first_line
from deploykit.npz_reader import UNREADABLE
from deploykit.plugins import Plugin
from deploykit.specs import Array, Feeds, Signature

# Opens an ONNX file without graph optimizations and returns its run function; handed in by the pipeline.
OnnxRunner = Callable[[Path], Callable[[Feeds], dict[str, Array]]]

DEFAULT_OPSET = 18
MIN_OPSET = 13


def check_archive(path: Path, writer: str) -> None:
    """Look at the members of a zip archive before a framework unpacks it.

    Args:
        path: The file.
        writer: The function that writes such files.

    Raises:
        SourceError: It is no zip archive, or one that no framework wrote.
    """
    expected = f"a file written by {writer}"
    try:
        why = unsafe_archive(path)
    except UNREADABLE as exc:
        raise SourceError(
            f"cannot read {path}: it is no zip archive, or is damaged ({first_line(exc)})", expected=expected
        ) from exc
    if why:
        raise SourceError(f"{path} {why}", expected=expected)


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What a user may ask of an export.

    Attributes:
        inputs: `name=dtype[dim,...]` or `name=dtype[dim,...]:low..high`, for sources without example inputs.
        dynamic: `batch` (the default: the first axis of every input), `none`, or `name:axis=symbol,...`.
        opset: ONNX opset of the default domain; None for 18, or for what an imported file has.
        way: "auto", "torch.export" or "torchscript".
        dims: Sizes for dynamic dimensions when inputs are made up.
        data: Real inputs for the parity check; anything that `Dataset.open` reads.
        task: What a Hugging Face model is for, where that is not what its config names.
        part: Which graph of a model that becomes several ("encoder", "decoder"); None for all of them.
        timeout_s: Seconds of CPU time that one way may take; None for a limit that grows with the model.
    """

    inputs: tuple[str, ...] = ()
    dynamic: tuple[str, ...] = ()
    opset: int | None = None
    way: str = "auto"
    dims: Mapping[str, int] = field(default_factory=dict)
    data: str | None = None
    task: str | None = None
    part: str | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """One road to ONNX.

    Attributes:
        name: "torch.export", "torchscript", "tf2onnx", "skl2onnx", "skl2onnx in float64" or "copy".
        dynamic: Whether the dynamic dimensions are kept; otherwise the shapes of the example are fixed.
        attention: Another attention implementation than the model's own ("eager"); empty for its own.
        patient: Whether it may take long, because no other way is left.
    """

    name: str
    dynamic: bool
    attention: str = ""
    patient: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        name = f"{self.name} with {self.attention} attention" if self.attention else self.name
        return name if self.dynamic else f"{name} with fixed shapes"


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs, and what the source model makes of them.

    Attributes:
        sizes: Size of every symbol.
        feeds: Inputs by name.
        outputs: The source's outputs by name.
    """

    sizes: dict[str, int]
    feeds: dict[str, Array]
    outputs: dict[str, Array]


class Source(ABC):
    """A loaded source.

    Attributes:
        kind: "pytorch", "pt2", "huggingface", "keras", "savedmodel", "tflite", "scikit-learn", "onnx", or what a plugin
            calls it.
        label: What the user called it.
        signature: Inputs with the wanted dynamic dimensions; outputs as observed.
        ranges: Values that made-up inputs may take.
        cases: Reference cases: several shapes, batch 1 among them, where dimensions are dynamic.
        data: Where the values of the cases come from: "example", "text", "generated" or a dataset's name.
        assets: Files that belong to the model (a tokenizer).
        notes: What the user must know.
        precision: The coarsest floating-point type that the source computes in, where its outputs may hide it.
        quantized: Whether it computes on quantized values, which runtimes round in different ways.
        plugin: Who opened it, where that is another distribution.
    """

    kind: str
    label: str
    signature: Signature
    ranges: dict[str, ValueRange]
    cases: tuple[Case, ...]
    data: str
    assets: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    precision: str | None = None
    quantized: bool = False
    plugin: Plugin | None = None

    @property
    @abstractmethod
    def ways(self) -> tuple[Way, ...]:
        """Roads to ONNX, in the order in which they should be tried."""

    def cases_for(self, way: Way) -> tuple[Case, ...]:
        """The cases that a result of ``way`` has to reproduce."""
        return self.cases

    def notes_on(self, way: Way) -> tuple[str, ...]:
        """What the user must know about the result of ``way``, once it is written."""
        return ()

    def run(self, feeds: Feeds) -> dict[str, Array] | None:
        """The source's outputs for other inputs than its cases'; None where it cannot be asked."""
        return None

    def tensors(self, feeds: Feeds) -> Any:
        """What the source computes on its way, as `capture.ModuleTensors` offers it; None where it cannot be seen."""
        return None

    @abstractmethod
    def write(self, way: Way, target: Path, opset: int | None) -> None:
        """Write ONNX to ``target``.

        Raises:
            ExportError: This road does not lead there.
        """

    @abstractmethod
    def tools(self) -> dict[str, str]:
        """Versions of the packages that take part."""
