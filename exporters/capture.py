"""Inner tensors of a torch module: every result of every operator, in the order in which they are made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deploykit.exporters.torch_onnx import from_numpy, to_numpy
from deploykit.extras import require
from deploykit.specs import Array, Feeds

# Operators that torch computes in one piece and ONNX in several; their decompositions are run beside them.
_COMPOSED = (
    "gelu", "silu", "hardswish", "hardsigmoid", "mish", "elu", "leaky_relu", "softplus", "addmm", "baddbmm",
    "native_layer_norm", "native_group_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "_softmax",
    "_log_softmax", "var_mean", "rsqrt", "addcmul", "addcdiv", "glu", "logit", "norm", "linalg_vector_norm",
)  # fmt: skip
# Operators that choose between scores, and what they become in ONNX.
_CHOICES = {
    "topk": "TopK", "sort": "TopK", "argmax": "ArgMax", "argmin": "ArgMin", "max": "ArgMax", "min": "ArgMin",
    "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """One operator that chooses, as it ran.

    Attributes:
        op: What it becomes in ONNX.
        inputs: The scores; both sides of a comparison.
        outputs: What it chose; the last are the indices.
    """

    op: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


class ModuleTensors:
    """What a module computes on its way; run again for every request, so that nothing is kept.

    Args:
        module: Takes tensors by position; deterministic.
        feeds: Inputs, in the module's order.
    """

    def __init__(self, module: Any, feeds: Feeds) -> None:
        self._module = module
        self._feeds = dict(feeds)
        self.sizes: dict[str, int] = {}
        self._record(self._measure)

    def _measure(self, name: str, tensor: Any) -> None:
        self.sizes[name] = int(tensor.numel()) * int(tensor.element_size())

    def fetch(self, names: Sequence[str]) -> dict[str, Array]:
        """Run the module and return these tensors."""
        wanted = set(names)
        found: dict[str, Array] = {}

        def keep(name: str, tensor: Any) -> None:
            if name in wanted:
                found[name] = to_numpy(tensor)

        self._record(keep)
        return found

    def choices(self, feeds: Feeds) -> list[Choice]:
        """What the module chose in one run, on other inputs too; see `_CHOICES`."""
        made: list[Choice] = []
        self._record(lambda name, tensor: None, feeds, made.append)
        return made

    def describe(self, name: str) -> str:
        """The operator, and the part of the module that called it."""
        where, _, op = name.partition(":")[2].rpartition(":")
        return f"{op} of {where}" if where else op

    def _record(
        self,
        visit: Callable[[str, Any], None],
        feeds: Feeds | None = None,
        choose: Callable[[Choice], None] = lambda choice: None,
    ) -> None:
        torch = require("torch", extra="torch")
        from torch.nn.attention import SDPBackend, sdpa_kernel

        # Fused attention kernels hide the scores that every exported graph computes.
        with _owners(self._module) as owner, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            given = self._feeds if feeds is None else {name: feeds[name] for name in self._feeds}
            with _recorder(torch, visit, owner, choose):
                self._module(*(from_numpy(a) for a in given.values()))


@contextlib.contextmanager
def _owners(module: Any) -> Iterator[Callable[[], str]]:
    """Tells the qualified name of the innermost submodule that is running."""
    stack: list[str] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: stack.append(name)

    def leave(*_: Any) -> None:
        if stack:
            stack.pop()

    if hasattr(module, "named_modules"):
        for name, part in module.named_modules():
            handles.append(part.register_forward_pre_hook(enter(name.removeprefix("model."))))
            handles.append(part.register_forward_hook(leave, always_call=True))
    try:
        yield lambda: stack[-1] if stack else ""
    finally:
        for handle in handles:
            handle.remove()


def _recorder(
    torch: Any, visit: Callable[[str, Any], None], owner: Callable[[], str], choose: Callable[[Choice], None]
) -> Any:
    from torch._decomp import decomposition_table
    from torch.utils._python_dispatch import TorchDispatchMode

    table = {op: rule for op, rule in decomposition_table.items() if _base_name(op) in _COMPOSED}

    class Recorder(TorchDispatchMode):  # type: ignore[misc]
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Collection[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            given = kwargs or {}
            rule = table.get(func)
            if rule is not None:
                # Some decompositions refuse some arguments; the operator itself is recorded in any case.
                with contextlib.suppress(Exception), self:
                    rule(*args, **given)
            result = func(*args, **given)
            op = _CHOICES.get(_base_name(func))
            whole = op in ("ArgMax", "ArgMin") and "arg" not in _base_name(func) and not isinstance(result, tuple)
            if op is not None and not whole:  # the largest of all elements, without its place
                choose(_choice(torch, op, args, result))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.numel():
                    visit(f"{self.count}:{owner()}:{_base_name(func)}", tensor)
                    self.count += 1
            return result

    return Recorder()


def _choice(torch: Any, op: str, args: tuple[Any, ...], result: Any) -> Choice:
    count = 2 if op in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual") else 1
    inputs = tuple(to_numpy(a if isinstance(a, torch.Tensor) else torch.tensor(a)) for a in args[:count])
    outputs = tuple(to_numpy(t) for t in (result if isinstance(result, tuple | list) else (result,)))
    return Choice(op, inputs, outputs[-1:] if op in ("ArgMax", "ArgMin") else outputs)


def _base_name(op: Any) -> str:
    """`aten.gelu.default` without its namespace and overload."""
    return str(op).split(".")[1] if "." in str(op) else str(op)
