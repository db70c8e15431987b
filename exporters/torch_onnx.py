"""The two ways from a flat PyTorch module to ONNX, and the names that the result gets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.errors import ExportError, first_line
from deploykit.extras import require
from deploykit.modelfile import read_model, rename_dimensions, signature_of, write_model
from deploykit.specs import Array, Dim, Feeds, Signature

if TYPE_CHECKING:
    import onnx

    from deploykit.exporters.pytorch import Call

# What torch.onnx leaves in the file about the machine it ran on: paths and source lines.
_PRIVATE_METADATA = ("stack_trace", "fx_node", "exported_program", "ExportedProgram")


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
            outputs = flatten_outputs(self.model(*head, **tail, **call.constants))
            self.output_names = tuple(_unique(outputs, call.names))
            return tuple(outputs.values())

    return Flat().eval()


def flatten_outputs(value: Any) -> dict[str, Any]:
    """Tensors in any nest of tuples, lists, dictionaries and dataclasses, by a readable name; None is left out."""
    torch = require("torch", extra="torch")
    from torch.utils import _pytree

    if isinstance(value, torch.Tensor):
        return {"output": value}
    leaves, _ = _pytree.tree_flatten_with_path(value)
    found: dict[str, Any] = {}
    for path, leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            continue
        keys = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", "")))) for k in path]
        name = re.sub(r"\W+", "_", "_".join(keys)).strip("_") or "output"
        found[f"output_{name}" if name[0].isdigit() else name] = leaf
    return found


def _unique(names: Mapping[str, Any], taken: tuple[str, ...]) -> list[str]:
    return [f"{name}_out" if name in taken else name for name in names]


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
    ways: dict[str, Callable[[Job, Path], None]] = {"torch.export": _by_torch_export, "torchscript": _by_torchscript}
    try:
        ways[way](job, target)
    except OSError:
        raise
    except Exception as exc:
        storage = _storage_cause(exc)
        if storage is not None:
            raise storage from exc
        raise ExportError(f"{way} failed: {torch_reason(exc)}") from exc
    tidy(target, job.signature)


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
        {axis: dim for axis, dim in enumerate(spec.shape or ()) if isinstance(dim, str)} or None
        for spec in job.signature.inputs
    )
    program_given = isinstance(job.module, torch.export.ExportedProgram)
    program = torch.onnx.export(
        job.module,
        () if program_given else tuple(from_numpy(a) for a in job.feeds.values()),
        dynamo=True,
        fallback=False,
        # The flat module takes *tensors: one entry for that parameter, holding one entry a tensor.
        dynamic_shapes=None if program_given else (shapes,),
        input_names=[s.name for s in job.signature.inputs],
        output_names=[s.name for s in job.signature.outputs],
        opset_version=job.opset,
    )
    program.save(str(target))


def _by_torchscript(job: Job, target: Path) -> None:
    torch = require("torch", extra="torch")
    axes = {
        spec.name: {axis: dim for axis, dim in enumerate(spec.shape or ()) if isinstance(dim, str)} for spec in job.signature
    }
    torch.onnx.export(
        job.module,
        tuple(from_numpy(a) for a in job.feeds.values()),
        str(target),
        dynamo=False,
        input_names=[s.name for s in job.signature.inputs],
        output_names=[s.name for s in job.signature.outputs],
        dynamic_axes={name: found for name, found in axes.items() if found},
        opset_version=job.opset,
    )


def torch_reason(exc: BaseException) -> str:
    """The sentence of torch's long messages that says why."""
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
    match = re.search(r"Could not guard on data-dependent expression ([^\n]+)", text)
    if match:
        where = re.search(r'File "([^"]+)", line (\d+)', text)
        line = f" ({Path(where[1]).name}:{where[2]})" if where else ""
        return f"control flow depends on data{line}: {match[1][:120]}"
    return first_line(seen, 240)


def tidy(target: Path, signature: Signature) -> None:
    """Write the wanted names and shapes into the file, and take private metadata out.

    Raises:
        ExportError: Inputs or outputs are not those of the module.
    """
    model = read_model(target)
    made = signature_of(model)
    wanted = {s.name for s in signature.inputs}
    unknown = [s.name for s in made.inputs if s.name not in wanted]
    if unknown or len(made.outputs) != len(signature.outputs):
        raise ExportError(
            f"the exported graph has inputs {[s.name for s in made.inputs]} and {len(made.outputs)} outputs",
            expected=f"inputs {sorted(wanted)} and {len(signature.outputs)} outputs",
        )
    shapes: dict[str, tuple[Dim, ...]] = {s.name: s.shape for s in signature if s.shape is not None}
    ranks = {s.name: len(s.shape or ()) for s in made}
    rename_dimensions(model, {n: shape for n, shape in shapes.items() if ranks.get(n) == len(shape)})
    _drop_private(model)
    for leftover in target.parent.glob(target.name + ".*"):
        leftover.unlink()
    write_model(model, target)


def _drop_private(model: onnx.ModelProto) -> None:
    def clean(owner: Any) -> None:
        kept = [p for p in owner.metadata_props if not any(word in p.key for word in _PRIVATE_METADATA)]
        del owner.metadata_props[:]
        owner.metadata_props.extend(kept)
        owner.doc_string = ""

    clean(model)
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        clean(graph)
        for item in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
            item.doc_string = ""
        for node in graph.node:
            clean(node)
            for attribute in node.attribute:
                graphs += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
    for function in model.functions:
        for node in function.node:
            clean(node)
