"""The two ways from a flat PyTorch module to ONNX, and the names that the result gets."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.errors import ExportError
from deploykit.exporters.boundaries import ANY, compared_sizes, edges_of
from deploykit.exporters.modules import has_projections, has_shared_weights
from deploykit.exporters.reasons import torch_reason
from deploykit.exporters.tidy import placeholders, tidy
from deploykit.exporters.tracing import frozen_decisions, sizes_stay_tensors, tracer_warnings
from deploykit.extras import require
from deploykit.nesting import flatten_outputs, left_out
from deploykit.specs import Array, Feeds, Signature, TensorSpec

if TYPE_CHECKING:
    from deploykit.exporters.binding import Call


@dataclass(frozen=True, slots=True)
class Job:
    """One export.

    Attributes:
        module: Takes the inputs by position, in the signature's order, and returns a tuple of tensors. A
            `torch.export.ExportedProgram` serves too, for the way "torch.export".
        feeds: Example inputs, every dynamic dimension at least 2.
        signature: Names and shapes that the result shall have.
        opset: Opset of the default domain.
    """

    module: Any
    feeds: dict[str, Array]
    signature: Signature
    opset: int


@dataclass(frozen=True, slots=True)
class Written:
    """What is to be known about an export.

    Attributes:
        notes: For the user.
        edges: Sizes by symbol where `forward` may take another path than the graph does; see `boundaries`.
    """

    notes: tuple[str, ...] = ()
    edges: Mapping[str, Sequence[int]] = field(default_factory=dict)


def flatten_module(module: Any, call: Call) -> Any:
    """Wrap a module so that it takes tensors by position and returns a tuple of tensors.

    The wrapper remembers the outputs' names in `output_names` after its first run, and in `left_out` the numbers among
    them.
    """
    torch = require("torch", extra="torch")

    class Flat(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = module
            self.input_names = call.names
            self.output_names: tuple[str, ...] = ()
            self.left_out: tuple[str, ...] = ()
            self.autocast = True

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            args, kwargs = call.arguments(tensors)
            if self.autocast:
                value = self.model(*args, **kwargs)
            else:
                with watch_autocast(off=True):
                    value = self.model(*args, **kwargs)
            outputs = flatten_outputs(value, call.names)
            if self.output_names and torch.jit.is_tracing():
                # In a trace, sizes are tensors as well; outputs are what they are in a plain run.
                return tuple(outputs[name] for name in self.output_names)
            self.output_names = tuple(outputs)
            self.left_out = tuple(left_out(value))
            return tuple(outputs.values())

    return Flat().eval()


def run_module(module: Any, feeds: Feeds, *, fast_path: bool = False) -> dict[str, Array]:
    """Run a flat module, or an exported program's module, on arrays.

    Args:
        module: The module.
        feeds: Its inputs, in order.
        fast_path: Whether torch may take its fused kernel for nn.TransformerEncoder. No export does, and its numbers at
            padded positions are others.
    """
    torch = require("torch", extra="torch")
    tensors = [from_numpy(a) for a in feeds.values()]
    was_on = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(was_on and fast_path)
    try:
        with torch.no_grad():
            outputs = module(*tensors)
    finally:
        torch.backends.mha.set_fastpath_enabled(was_on)
    return {name: to_numpy(t) for name, t in zip(module.output_names, outputs, strict=True)}


@contextlib.contextmanager
def watch_autocast(*, off: bool = False) -> Iterator[list[str]]:
    """Tell whether `torch.autocast` is used on the CPU: the list grows by every use.

    Args:
        off: Make it do nothing there.
    """
    from torch.amp.autocast_mode import autocast

    original = autocast.__init__
    seen: list[str] = []

    def init(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        used = device_type == "cpu" and enabled
        seen.extend(["cpu"] if used else [])
        original(self, device_type, dtype, enabled and not (used and off), cache_enabled)

    autocast.__init__ = init
    try:
        yield seen
    finally:
        autocast.__init__ = original


def runs_without_autocast(module: Any, feeds: Feeds) -> bool:
    """Whether a flat module runs in float32 as well; some weights fit their inputs under autocast only."""
    module.autocast = False
    try:
        run_module(module, feeds)
    except Exception:  # noqa: BLE001 - whatever the reason, it stays as it was
        module.autocast = True
    return not module.autocast


def copy_buffers(module: Any) -> dict[str, Any]:
    """The buffers' values by name."""
    return {name: tensor.detach().clone() for name, tensor in module.named_buffers()}


def changed_buffers(module: Any, before: Mapping[str, Any]) -> list[str]:
    """Names of the buffers, as the user's module calls them, whose values are not those of ``before``."""
    now = dict(module.named_buffers())
    torch = require("torch", extra="torch")
    return [
        name.removeprefix("model.")
        for name, tensor in now.items()
        if name not in before
        or before[name].shape != tensor.shape
        or not torch.equal(before[name].nan_to_num(), tensor.nan_to_num())
    ]


def restore_buffers(module: Any, before: Mapping[str, Any], change: Sequence[str] = ()) -> None:
    """Write the values of ``before`` back; other values than those into the buffers in ``change``."""
    torch = require("torch", extra="torch")
    with torch.no_grad():
        for name, tensor in module.named_buffers():
            if name in before and before[name].shape == tensor.shape:
                value = before[name]
                if name.removeprefix("model.") in change:
                    value = ~value if value.dtype == torch.bool else value + 1
                tensor.copy_(value)


def preload(way: str) -> None:
    """Import here what a child process would import anew at every export."""
    if way == "torch.export":
        for name in ("torch._dynamo", "torch.export", "onnxscript.function_libs.torch_lib.ops"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def to_numpy(tensor: Any) -> Array:
    """A tensor's values; bfloat16 through ml_dtypes."""
    torch = require("torch", extra="torch")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if plain.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(plain.numpy()).copy()


def from_numpy(array: Array) -> Any:
    """A tensor with its own memory."""
    torch = require("torch", extra="torch")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, copy=True, order="C"))


def write(job: Job, way: str, target: Path) -> Written:
    """Export by one way and put names, shapes and metadata in order.

    Raises:
        ExportError: This way does not lead there; the message is torch's reason.
    """
    ways: dict[str, Callable[[Job, Path], Written]] = {
        "torch.export": _by_torch_export,
        "torchscript": _by_torchscript,
    }
    try:
        written = ways[way](job, target)
    except (OSError, ExportError):
        raise
    except Exception as exc:
        storage = _storage_cause(exc)
        if storage is not None:
            raise storage from exc
        raise ExportError(torch_reason(exc, [s.name for s in job.signature.inputs])) from exc
    tidy(target, job.signature, job.opset)
    return written


def _storage_cause(exc: BaseException) -> OSError | None:
    """The OSError of a full disk, however deep torch wrapped it."""
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno:
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _by_torch_export(job: Job, target: Path) -> Written:
    torch = require("torch", extra="torch")
    require("onnxscript", extra="torch")
    shapes = tuple(
        {axis: re.sub(r"\W+", "_", dim) for axis, dim in enumerate(spec.shape or ()) if isinstance(dim, str)} or None
        for spec in job.signature.inputs
    )
    tensors = tuple(from_numpy(a) for a in job.feeds.values())
    source = job.module
    program_given = isinstance(source, torch.export.ExportedProgram)
    if not program_given and has_projections(source):
        # torch would write ONNX's LSTM, which has no projections: steps of matrix products are right.
        dims = tuple(spec and dict.fromkeys(spec, torch.export.Dim.DYNAMIC) for spec in shapes)
        source = torch.export.export(source, tensors, dynamic_shapes=(dims,), strict=False).run_decompositions()
        program_given = True
    program = torch.onnx.export(
        source,
        () if program_given else tensors,
        dynamo=True,
        # The flat module takes *tensors: one entry for that parameter, holding one entry a tensor.
        dynamic_shapes=None if program_given else (shapes,),
        input_names=placeholders("input", job.signature.inputs),
        output_names=placeholders("output", job.signature.outputs),
        opset_version=job.opset,
    )
    program.save(str(target))
    made = program.exported_program
    return Written(edges=edges_of(made, job.signature.inputs) if made is not None else {})


def export_again(run: Any, feeds: Feeds, specs: Sequence[TensorSpec]) -> Any:
    """A program of `torch.export` from something that runs one.

    Args:
        run: Takes tensors by position and returns a tuple of tensors; the program's module is its `program_module`.
        feeds: Example inputs.
        specs: Their dynamic dimensions; which of them follow from others, torch finds out.
    """
    torch = require("torch", extra="torch")

    class Flat(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = run.program_module

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            outputs: tuple[Any, ...] = run(*tensors)
            return outputs

    return export_program(Flat(), feeds, specs)


def export_program(module: Any, feeds: Feeds, specs: Sequence[TensorSpec]) -> Any:
    """A program of `torch.export` from a module that takes tensors by position.

    Args:
        module: It, in evaluation mode.
        feeds: Example inputs.
        specs: Their dynamic dimensions; which of them follow from others, torch finds out.
    """
    torch = require("torch", extra="torch")
    shapes = tuple(
        {axis: torch.export.Dim.AUTO for axis, dim in enumerate(spec.shape or ()) if isinstance(dim, str)} or None
        for spec in specs
    )
    tensors = tuple(from_numpy(feeds[spec.name]) for spec in specs)
    return torch.export.export(module, tensors, dynamic_shapes=(shapes,), strict=False)


def _by_torchscript(job: Job, target: Path) -> Written:
    """Trace the module; where the trace would freeze a decision on data, compile its Python code instead."""
    tensors = tuple(from_numpy(a) for a in job.feeds.values())
    if is_scripted(job.module.model):
        _trace(job, _traced(job.module, tensors), target)
        return Written()
    with tracer_warnings() as warned, sizes_stay_tensors(), compared_sizes() as sizes:
        _trace(job, job.module, target)
    frozen = frozen_decisions(job.module, tensors, warned)
    notes = []
    if frozen.wrong:
        places = ", ".join(map(str, frozen.wrong))
        _compile(job, target, places)
        notes.append(f"forward decides by its inputs' values at {places}; TorchScript compiled it instead of tracing")
    if frozen.checks:
        notes.append(f"checks of the inputs' values are not in the graph: {', '.join(map(str, frozen.checks))}")
    if frozen.unseen:
        notes.append(
            "held as the example decides it, for no inputs that were tried decide it otherwise: "
            f"{', '.join(map(str, frozen.unseen))}"
        )
    if frozen.sizes:
        notes.append(
            "sizes depend on the inputs' values, and the trace holds decisions on sizes fixed at "
            f"{', '.join(map(str, frozen.sizes[:4]))}: try inputs that make them small or zero, with --data"
        )
    return Written(tuple(notes), {ANY: sorted(set(sizes))} if sizes else {})


def _compile(job: Job, target: Path, places: str) -> None:
    """Export with the user's module compiled by torch.jit.script, which keeps branches and loops.

    Raises:
        ExportError: Its Python code does not compile.
    """
    torch = require("torch", extra="torch")
    whole = job.module.model
    try:
        job.module.model = torch.jit.script(whole)
        _trace(job, _traced(job.module, tuple(from_numpy(a) for a in job.feeds.values())), target)
    except OSError:
        raise
    except Exception as exc:
        raise ExportError(
            f"a trace would freeze the decision that forward takes on its inputs' values at {places}, and TorchScript "
            f"cannot compile it ({torch_reason(exc)})",
            hint="write it with torch.where or torch.cond, or take it out of forward",
        ) from exc
    finally:
        job.module.model = whole


def _traced(module: Any, tensors: tuple[Any, ...]) -> Any:
    """The flat module as TorchScript; torch.onnx cannot trace calls of compiled modules itself."""
    torch = require("torch", extra="torch")
    with torch.no_grad():
        return torch.jit.trace(module, tensors, check_trace=False, strict=False)


def is_scripted(module: Any) -> bool:
    """Whether a module is TorchScript."""
    return isinstance(module, require("torch", extra="torch").jit.ScriptModule)


def _trace(job: Job, module: Any, target: Path) -> None:
    torch = require("torch", extra="torch")
    specs = (*job.signature.inputs, *job.signature.outputs)
    names = placeholders("input", job.signature.inputs) + placeholders("output", job.signature.outputs)
    axes = {
        name: {axis: dim for axis, dim in enumerate(spec.shape or ()) if isinstance(dim, str)}
        for name, spec in zip(names, specs, strict=True)
    }
    torch.onnx.export(
        module,
        tuple(from_numpy(a) for a in job.feeds.values()),
        str(target),
        dynamo=False,
        # Folding would store a shared weight a second time, transposed; runtimes fold when they load.
        do_constant_folding=not has_shared_weights(job.module),
        input_names=placeholders("input", job.signature.inputs),
        output_names=placeholders("output", job.signature.outputs),
        dynamic_axes={name: found for name, found in axes.items() if found},
        opset_version=job.opset,
    )
