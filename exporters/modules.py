"""A user's module made ready for export: unwrapped, checked, on the CPU, in a precision that can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from deploykit.errors import SourceError, first_line
from deploykit.extras import require

_FLOAT8 = "float8"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A module that can be run on the CPU.

    Attributes:
        module: In evaluation mode.
        notes: What was changed.
        precision: "float16" where weights are of that type; else None.
        widened: Whether bfloat16 weights became float32 ones, so that inputs have to follow.
    """

    module: Any
    notes: tuple[str, ...]
    precision: str | None
    widened: bool


def prepare(module: Any, label: str) -> Prepared:
    """Take wrappers off and check what is inside.

    Raises:
        SourceError: Weights that are not there, or of a kind that ONNX does not have.
    """
    torch = require("torch", extra="torch")
    module = unwrap(module)
    _refuse(module, label)
    notes = []
    if any(part.training for part in module.modules()):
        notes.append("the module was in training mode; it is exported in evaluation mode")
    try:
        module = module.eval().cpu()
    except Exception as exc:
        raise SourceError(
            f"{label} cannot be moved to the CPU ({first_line(exc)})",
            expected="a module whose weights are loaded",
            hint="mend the factory",
        ) from exc
    dtypes = {tensor.dtype for _, tensor in _weights(module)}
    widened = torch.bfloat16 in dtypes
    if widened:
        module = module.float()
        notes.append(
            "the weights are bfloat16, which CPU runtimes do not compute in; the model is exported in float32, with "
            "the same values"
        )
    half = torch.float16 in dtypes and not widened
    return Prepared(module, tuple(notes), "float16" if half else None, widened)


# Operators that hand values on without rounding them.
_MOVES = frozenset(
    {
        "_to_copy", "view", "_unsafe_view", "reshape", "slice", "select", "t", "transpose", "permute", "expand",
        "unsqueeze", "squeeze", "clone", "detach", "alias", "cat", "stack", "copy_", "split", "unbind", "as_strided",
        "embedding", "index", "index_select", "gather", "lift_fresh",
    }
)  # fmt: skip


def computes_in_half(run: Callable[[], Any]) -> bool:
    """Whether an operator rounds to float16 on the way; a table that is kept in float16 is no such operator.

    Args:
        run: Runs the module once.
    """
    torch = require("torch", extra="torch")
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    found = False

    class Watch(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal found
            out = func(*args, **(kwargs or {}))
            name = func.name().partition("::")[2].partition(".")[0]
            made = (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
            found = found or (name not in _MOVES and any(leaf.dtype == torch.float16 for leaf in made))
            return out

    with Watch():
        run()
    return found


def unwrap(module: Any) -> Any:
    """The user's module inside torch.compile, DataParallel and their like; compiled submodules run eagerly again."""
    module = bare(module)
    for parent in list(module.modules()):
        if getattr(parent, "_compiled_call_impl", None) is not None:
            parent._compiled_call_impl = None  # module.compile() in place
        for name, child in list(parent.named_children()):
            inner = unwrap(child) if hasattr(child, "_orig_mod") else child
            if inner is not child:
                setattr(parent, name, inner)
    return module


def bare(module: Any) -> Any:
    """The user's module inside its wrappers; nothing is changed."""
    torch = require("torch", extra="torch")
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod") and isinstance(module, torch.nn.Module):
            module = module._orig_mod
        else:
            return module


def recurrent_layers(module: Any) -> list[str]:
    """Recurrent layers of a module, as `name (LSTM)`."""
    torch = require("torch", extra="torch")
    return [
        f"{name or 'the module itself'} ({type(part).__name__})"
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.RNNBase)
    ]


def has_projections(module: Any) -> bool:
    """Whether there is an LSTM with `proj_size`."""
    return any(getattr(part, "proj_size", 0) for part in module.modules())


def has_shared_weights(module: Any) -> bool:
    """Whether one parameter stands at two places (an embedding that is the output layer too)."""
    places = [id(weight) for _, weight in module.named_parameters(remove_duplicate=False)]
    return len(set(places)) < len(places)


def has_fast_path(module: Any) -> bool:
    """Whether torch has a fused kernel for a part of the module, with other numbers at padded positions."""
    torch = require("torch", extra="torch")
    kinds = (torch.nn.TransformerEncoder, torch.nn.TransformerEncoderLayer, torch.nn.MultiheadAttention)
    return any(isinstance(part, kinds) for part in module.modules())


def count_modules(module: Any) -> int:
    """Submodules, each as often as it stands there: a measure of the work of an export."""
    return sum(1 for _ in module.modules())


def _weights(module: Any) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _refuse(module: Any, label: str) -> None:
    from torch.nn.parameter import is_lazy

    quantized = next((n for n, part in module.named_modules() if _is_quantized(part)), None)
    if quantized is not None:
        part = module.get_submodule(quantized)
        where = f"submodule {quantized!r}" if quantized else "it"
        raise SourceError(
            f"{label} is quantized already ({where} is a {type(part).__module__}.{type(part).__name__}), and torch's "
            "packed int8 weights have no ONNX form",
            expected="the float module",
            hint="export that one, then: deploykit quantize static -m OUT --data calib.npz",
        )
    for name, tensor in _weights(module):
        if is_lazy(tensor):
            raise SourceError(
                f"{label}: {name} has no shape yet (a lazy module that never ran)",
                expected="a module whose weights are loaded",
                hint="run it once in the factory, and load its weights",
            )
        if tensor.is_meta:
            raise SourceError(
                f"{label} cannot be moved to the CPU: {name} is on the meta device, without values",
                expected="a module whose weights are loaded",
                hint="load the weights in the factory: module.to_empty(device='cpu'); module.load_state_dict(...)",
            )
        why = _unusual_weight(tensor)
        if why:
            raise SourceError(f"{label}: {name} is {why[0]}", expected="dense floating-point weights", hint=why[1])


def _unusual_weight(tensor: Any) -> tuple[str, str] | None:
    torch = require("torch", extra="torch")
    if tensor.layout is not torch.strided:
        return f"sparse ({tensor.layout}), which ONNX graphs do not compute with", "make it dense: tensor.to_dense()"
    if tensor.is_quantized:
        return "a quantized tensor", "export the float module, and quantize the result with deploykit quantize"
    if _FLOAT8 in str(tensor.dtype):
        return f"{tensor.dtype}, which CPU runtimes do not compute in", "convert it in the factory: module.float()"
    kind = type(tensor)
    if kind.__module__.partition(".")[0] == "torchao":
        return f"quantized by torchao ({kind.__name__})", "export the float module, then: deploykit quantize"
    return None


def _is_quantized(part: Any) -> bool:
    where = type(part).__module__
    return ".quantized" in where and where.startswith(("torch.ao.nn.", "torch.nn.")) and "reference" not in where
