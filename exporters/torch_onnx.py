"""The two ways from a flat PyTorch module to ONNX, and the names that the result gets."""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.errors import ExportError, SourceError, first_line
from deploykit.extras import require
from deploykit.modelfile import read_model, rename_dimensions, signature_of, write_model
from deploykit.specs import Array, Dim, Feeds, Signature, TensorSpec

if TYPE_CHECKING:
    import onnx

    from deploykit.exporters.pytorch import Call


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


def flatten_module(module: Any, call: Call) -> Any:
    """Wrap a module so that it takes tensors by position and returns a tuple of tensors.

    The wrapper remembers the outputs' names in `output_names` after its first run.
    """
    torch = require("torch", extra="torch")

    class Flat(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = module
            self.input_names = call.names
            self.output_names: tuple[str, ...] = ()

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            head = tensors[: call.positional]
            tail = dict(zip(call.names[call.positional :], tensors[call.positional :], strict=True))
            outputs = flatten_outputs(self.model(*head, **tail, **call.constants), call.names)
            if self.output_names and torch.jit.is_tracing():
                # In a trace, sizes are tensors as well; outputs are what they are in a plain run.
                return tuple(outputs[name] for name in self.output_names)
            self.output_names = tuple(outputs)
            return tuple(outputs.values())

    return Flat().eval()


def flatten_outputs(value: Any, taken: tuple[str, ...]) -> dict[str, Any]:
    """Tensors in a nest of tuples, lists, dictionaries and dataclasses, by a readable name that is not ``taken``.

    Constants (None, numbers, sizes, strings) are left out: a graph has no outputs for them.

    Raises:
        SourceError: There is an object that might hold tensors and cannot be looked into.
    """
    found: dict[str, Any] = {}
    for path, leaf in _leaves(value, ()):
        name = re.sub(r"[^\w.]+", "_", "_".join(path)).strip("_.") or "output"
        name = f"output_{name}" if name[0].isdigit() else name
        name = f"{name}_out" if name in taken else name
        free, number = name, 1
        while free in found or free in taken:
            number += 1
            free = f"{name}_{number}"
        found[free] = leaf
    return found


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    torch = require("torch", extra="torch")
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        keys = getattr(value, "_fields", range(len(value)))
        for key, item in zip(keys, value, strict=True):
            yield from _leaves(item, (*path, str(key)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), (*path, field.name))
    elif value is not None and not isinstance(value, bool | int | float | complex | str | torch.SymInt | torch.dtype):
        raise SourceError(
            f"output {'.'.join(path) or 'of the module'} is a {type(value).__name__}",
            expected="tensors, or tuples, lists, dictionaries and dataclasses of them",
            hint="wrap the module in one whose forward returns tensors",
        )


def run_module(module: Any, feeds: Feeds) -> dict[str, Array]:
    """Run a flat module, or an exported program's module, on arrays."""
    torch = require("torch", extra="torch")
    tensors = [from_numpy(a) for a in feeds.values()]
    with torch.no_grad():
        outputs = module(*tensors)
    return {name: to_numpy(t) for name, t in zip(module.output_names, outputs, strict=True)}


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


def write(job: Job, way: str, target: Path) -> None:
    """Export by one way and put names, shapes and metadata in order.

    Raises:
        ExportError: This way does not lead there; the message holds torch's reason.
    """
    ways: dict[str, Callable[[Job, Path], None]] = {
        "torch.export": _by_torch_export,
        "torchscript": _by_torchscript,
    }
    try:
        ways[way](job, target)
    except OSError:
        raise
    except Exception as exc:
        storage = _storage_cause(exc)
        if storage is not None:
            raise storage from exc
        raise ExportError(f"{way} failed: {torch_reason(exc, [s.name for s in job.signature.inputs])}") from exc
    tidy(target, job.signature, job.opset)


def _storage_cause(exc: BaseException) -> OSError | None:
    """The OSError of a full disk, however deep torch wrapped it."""
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno:
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _by_torch_export(job: Job, target: Path) -> None:
    torch = require("torch", extra="torch")
    require("onnxscript", extra="torch")
    shapes = tuple(
        {axis: re.sub(r"\W+", "_", dim) for axis, dim in enumerate(spec.shape or ()) if isinstance(dim, str)} or None
        for spec in job.signature.inputs
    )
    program_given = isinstance(job.module, torch.export.ExportedProgram)
    program = torch.onnx.export(
        job.module,
        () if program_given else tuple(from_numpy(a) for a in job.feeds.values()),
        dynamo=True,
        # The flat module takes *tensors: one entry for that parameter, holding one entry a tensor.
        dynamic_shapes=None if program_given else (shapes,),
        input_names=_placeholders("input", job.signature.inputs),
        output_names=_placeholders("output", job.signature.outputs),
        opset_version=job.opset,
    )
    program.save(str(target))


def _by_torchscript(job: Job, target: Path) -> None:
    torch = require("torch", extra="torch")
    specs = (*job.signature.inputs, *job.signature.outputs)
    names = _placeholders("input", job.signature.inputs) + _placeholders("output", job.signature.outputs)
    axes = {
        name: {axis: dim for axis, dim in enumerate(spec.shape or ()) if isinstance(dim, str)}
        for name, spec in zip(names, specs, strict=True)
    }
    torch.onnx.export(
        job.module,
        tuple(from_numpy(a) for a in job.feeds.values()),
        str(target),
        dynamo=False,
        input_names=_placeholders("input", job.signature.inputs),
        output_names=_placeholders("output", job.signature.outputs),
        dynamic_axes={name: found for name, found in axes.items() if found},
        opset_version=job.opset,
    )


def _placeholders(role: str, specs: Sequence[TensorSpec]) -> list[str]:
    """Names for the export itself: torch does not see that the wanted ones collide with its own, like "linear"."""
    return [f"deploykit.{role}.{i}" for i in range(len(specs))]


def torch_reason(exc: BaseException, inputs: Sequence[str] = ()) -> str:
    """The sentence of torch's long messages that says why.

    Args:
        exc: What torch raised.
        inputs: Names for the inputs that torch counts.
    """
    seen: BaseException = exc
    while seen.__cause__ is not None:
        seen = seen.__cause__
    text = str(seen)
    for pattern in (
        r"No ONNX function found for <OpOverload\(op='([^']+)'",
        r"No decompositions? registered for.*?'([\w:.]+)'",
        r"Exporting the operator '([^']+)'.*?not supported",
        r"Unsupported: ONNX export of operator ([\w:]+)",
    ):
        match = re.search(pattern, text, re.DOTALL)
        if match:
            return f"the operator {match[1]} has no ONNX form"
    match = re.search(
        r"Could not (?:guard on|extract specialized integer from) data-dependent expression ([^\n(]+)", text
    )
    if match:
        where = re.search(r'File "([^"]+)", line (\d+)', text)
        line = f" ({Path(where[1]).name}:{where[2]})" if where else ""
        return f"control flow depends on data{line}: {match[1].strip()[:120]}"
    match = re.search(r"inferred a static shape of (\d+) for dimension .*?\[(\d+)\]\.shape\[(\d+)\]", text)
    if match:
        number = int(match[2])
        name = repr(inputs[number]) if number < len(inputs) else f"input {number}"
        return f"the module fixes axis {match[3]} of {name} at {match[1]}"
    return first_line(seen, 240)


def tidy(target: Path, signature: Signature, opset: int) -> None:
    """Write the wanted names and shapes into the file, and take private metadata out.

    Raises:
        ExportError: Inputs, outputs or the opset are not those that were asked for.
    """
    model = read_model(target)
    _name_values(model, signature)
    _check_made(signature_of(model), signature)
    found = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if found != opset:
        # torch.onnx only warns where it cannot convert to the opset.
        raise ExportError(
            f"torch wrote opset {found} instead of {opset}", hint="choose another --opset, or leave it out"
        )
    _restore_inputs(model, signature)
    shapes: dict[str, tuple[Dim, ...]] = {s.name: s.shape for s in signature if s.shape is not None}
    ranks = {s.name: len(s.shape or ()) for s in signature_of(model)}
    rename_dimensions(model, {n: shape for n, shape in shapes.items() if ranks.get(n) == len(shape)})
    _drop_private(model)
    for leftover in target.parent.glob(glob.escape(target.name) + ".*"):
        leftover.unlink()
    write_model(model, target)


def _name_values(model: onnx.ModelProto, signature: Signature) -> None:
    """Give inputs and outputs their names, and another one to whatever else in the graph has it."""
    wanted = {
        placeholder: spec.name
        for role, specs in (("input", signature.inputs), ("output", signature.outputs))
        for placeholder, spec in zip(_placeholders(role, specs), specs, strict=True)
    }
    graphs = [model.graph]
    for graph in graphs:  # grows while it is walked
        graphs += _subgraphs(graph.node)
    used = {name for graph in graphs for node in graph.node for name in (*node.input, *node.output)}
    used |= {item.name for graph in graphs for item in (*graph.initializer, *graph.input, *graph.output)}
    renamed = dict(wanted)
    for name in wanted.values():
        number = 0
        free = name
        while free in used or free in wanted.values():
            number += 1
            free = f"{name}.{number}"
        renamed[name] = free
        used.add(free)
    for graph in graphs:
        for item in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
            item.name = renamed.get(item.name, item.name)
        for node in graph.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]


def _check_made(made: Signature, wanted: Signature) -> None:
    inputs = {s.name: s for s in wanted.inputs}
    unknown = [s.name for s in made.inputs if s.name not in inputs]
    have, want = [s.name for s in made.outputs], [s.name for s in wanted.outputs]
    if unknown or have != want:
        raise ExportError(
            f"the exported graph has inputs {[s.name for s in made.inputs]} and outputs {have}",
            expected=f"inputs {list(inputs)} and outputs {want}",
        )
    for spec in made.inputs:
        asked = inputs[spec.name]
        if spec.dtype != asked.dtype or len(spec.shape or ()) != len(asked.shape or ()):
            raise ExportError(f"the exported graph has input {spec}", expected=str(asked))
        for axis, (size, dim) in enumerate(zip(spec.shape or (), asked.shape or (), strict=True)):
            if isinstance(size, int) and size != dim:
                raise ExportError(
                    f"the exported graph fixes axis {axis} of {spec.name!r} at {size}", expected=f"{dim!r} there"
                )


def _restore_inputs(model: onnx.ModelProto, signature: Signature) -> None:
    """Give back the inputs that no node reads (TorchScript leaves them out), and the signature's order."""
    from onnx import helper

    there = {value.name: value for value in model.graph.input}
    made = []
    for spec in signature.inputs:
        if spec.name in there:
            made.append(there.pop(spec.name))
        else:
            kind = helper.np_dtype_to_tensor_dtype(numpy_dtype(spec.dtype))
            made.append(helper.make_tensor_value_info(spec.name, kind, spec.shape))
    made += there.values()  # initializers that older IR versions list as inputs
    del model.graph.input[:]
    model.graph.input.extend(made)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a name out of `specs.DTYPES`; bfloat16 through ml_dtypes."""
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    return found


def _drop_private(model: onnx.ModelProto) -> None:
    """Take metadata and documentation strings out of the model, its graphs and functions.

    torch writes stack traces with paths, the whole FX graph and the names of classes, with hashes, into them: private,
    and different in every process.
    """
    _clean(model)
    for function in model.functions:
        _clean(function, *function.value_info, *function.node)
    graphs = [model.graph, *_subgraphs(node for function in model.functions for node in function.node)]
    while graphs:
        graph = graphs.pop()
        _clean(graph, *graph.value_info, *graph.input, *graph.output, *graph.initializer, *graph.node)
        graphs += _subgraphs(graph.node)


def _subgraphs(nodes: Iterable[onnx.NodeProto]) -> list[onnx.GraphProto]:
    found: list[onnx.GraphProto] = []
    for node in nodes:
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            found += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
    return found


def _clean(*owners: Any) -> None:
    for owner in owners:
        del owner.metadata_props[:]
        owner.ClearField("doc_string")
