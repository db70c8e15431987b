"""Decisions that a trace freezes: Python code in `forward` that looks at the values of tensors.

TorchScript's tracer follows one run. Where `forward` asks `if x.sum() > 0:`, the graph holds the branch that the
example took, and gives wrong numbers, without an error, for inputs that would take the other. The tracer warns of every
conversion of a tensor to a Python value, sizes and constants included, so that models in daily use warn dozens of times
for no reason. Here the module runs once more, under a dispatcher mode that follows which values come from the inputs;
each conversion of such a value is then answered the other way, to see whether that changes the outputs.
"""

from __future__ import annotations

import builtins
import copy
import functools
import linecache
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from deploykit.extras import require

# Places that are tried out, at most; each costs a run.
_MAX_TRIALS = 12
# Other answers than the true number: a neighbour, another sign, and one beyond most thresholds (yet no huge size).
_OTHERS: tuple[Callable[[Any], Any], ...] = (lambda n: n + 1, lambda n: -n - 1, lambda n: n + 4096)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A line of code."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


# A place, and what is answered there in place of a value, of which this is the n-th.
_Flip = tuple[Place, Callable[[Any, int], Any]]
# Inputs, outputs, and what Python saw at every place.
_Run = tuple[tuple[Any, ...], tuple[Any, ...], dict[Place, list[Any]]]


def user_place(frame: FrameType | None) -> Place | None:
    """The innermost line of code that belongs neither to torch nor to this package nor to the standard library."""
    skipped = _library_roots()
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(skipped):
            return Place(file, frame.f_lineno)
        frame = frame.f_back
    return None


def raising_place(exc: BaseException) -> Place | None:
    """The innermost line of the user's code that an exception passed."""
    skipped = _library_roots()
    found = None
    step = exc.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if not file.startswith(skipped):
            found = Place(file, step.tb_lineno)
        step = step.tb_next
    return found


@functools.cache
def _library_roots() -> tuple[str, ...]:
    names = (
        "torch",
        "onnx",
        "onnxscript",
        "onnx_ir",
        "deploykit",
        "numpy",
        "sympy",
        "warnings",
        "contextlib",
        "functools",
    )
    files = [Path(str(getattr(sys.modules.get(name), "__file__", None) or "")) for name in names]
    roots = [f"{file.parent}{os.sep}" if file.name == "__init__.py" else str(file) for file in files if file.name]
    return ("<", f"{Path(__file__).parent}{os.sep}", *roots)


@contextmanager
def tracer_warnings() -> Iterator[dict[Place, str]]:
    """Collect where the tracer froze something, with its words; other warnings go where they went before."""
    torch = require("torch", extra="torch")
    found: dict[Place, str] = {}
    with warnings.catch_warnings():
        outer = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
            if isinstance(category, type) and issubclass(category, torch.jit.TracerWarning):
                place = user_place(sys._getframe(1)) or Place(filename, lineno)
                found.setdefault(place, str(message))
            outer(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        warnings.simplefilter("always", torch.jit.TracerWarning)
        yield found


@contextmanager
def sizes_stay_tensors() -> Iterator[None]:
    """Keep arithmetic on sizes in the trace where Python's own functions would freeze it.

    In a trace a size is a tensor, but `math.ceil(size / 2)` asks it for a float, and `max(size - 3, 0)` for a truth
    value. TensorFlow's padding, as EfficientNet ports compute it, needs both.
    """
    torch = require("torch", extra="torch")

    def rounded(function: Any) -> Any:
        return lambda tensor: function(tensor).to(torch.int64) if tensor.is_floating_point() else tensor

    def extreme(original: Any, function: Any) -> Any:
        def chosen(*args: Any, **kwargs: Any) -> Any:
            sizes = len(args) > 1 and not kwargs and any(isinstance(a, torch.Tensor) for a in args)
            if not sizes or not torch.jit.is_tracing() or any(getattr(a, "ndim", 0) for a in args):
                return original(*args, **kwargs)
            return functools.reduce(function, [torch.as_tensor(a) for a in args])

        return chosen

    patches: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "__ceil__", rounded(torch.ceil)),
        (torch.Tensor, "__floor__", rounded(torch.floor)),
        (builtins, "max", extreme(builtins.max, torch.maximum)),
        (builtins, "min", extreme(builtins.min, torch.minimum)),
    ]
    before = [(owner, name, getattr(owner, name, None)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@dataclass(frozen=True, slots=True)
class Frozen:
    """What a trace froze.

    Attributes:
        wrong: Decisions on the inputs' values whose other outcome gives other outputs.
        checks: Decisions on the inputs' values that only raise errors.
        sizes: Decisions on a size that depends on the inputs' values.
        unseen: Decisions on the inputs' values that make no difference for the example, and that went the same way for
            all other inputs that were tried.
    """

    wrong: tuple[Place, ...] = ()
    checks: tuple[Place, ...] = ()
    sizes: tuple[Place, ...] = ()
    unseen: tuple[Place, ...] = ()


def frozen_decisions(module: Any, tensors: tuple[Any, ...], warned: dict[Place, str]) -> Frozen:
    """Which of the tracer's warnings matter.

    Args:
        module: Takes tensors by position, returns a tuple of tensors.
        tensors: Inputs of the trace.
        warned: What `tracer_warnings` found.
    """
    if not warned:
        return Frozen()
    expected, watch = _watched(module, tensors, None)
    found: dict[str, list[Place]] = {"wrong": [], "check": [], "same": [], "unseen": []}
    elsewhere: list[_Run] | None = None
    for place in [p for p in watch.seen if p in warned][:_MAX_TRIALS]:
        outcome = _other_outcome(module, tensors, place, expected)
        if outcome == "same":
            # `if mask.all():` skips work that changes nothing where the mask is full, and only there.
            elsewhere = _runs_elsewhere(module, tensors) if elsewhere is None else elsewhere
            outcome = _held_elsewhere(module, elsewhere, place, watch.seen[place])
        found[outcome].append(place)
    others = [p for p in warned if p not in watch.seen] if watch.data_sizes else []
    return Frozen(tuple(found["wrong"]), tuple(found["check"]), tuple(others), tuple(found["unseen"]))


def _runs_elsewhere(module: Any, tensors: tuple[Any, ...]) -> list[_Run]:
    """The module on other inputs, as far as it accepts them: what it gave, and what Python saw on the way."""
    found = []
    for given in _other_inputs(tensors):
        with suppress(Exception):  # whatever the user's code says of inputs that may be none
            outputs, watch = _watched(module, given, None)
            found.append((given, outputs, watch.seen))
    return found


def _other_inputs(tensors: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Inputs of the same shapes with other values: drawn, all small, and all large."""
    torch = require("torch", extra="torch")
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Any) -> Any:
        if tensor.numel() == 0 or tensor.is_complex():
            return tensor
        if tensor.is_floating_point():
            return tensor + torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        # Integers stay at or below those of the example, which may be indices.
        low, high = sorted((0, int(tensor.max()))) if tensor.dtype != torch.bool else (0, 1)
        return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor.dtype)

    def small(tensor: Any) -> Any:
        return torch.zeros_like(tensor)

    def large(tensor: Any) -> Any:
        if tensor.dtype == torch.bool or tensor.numel() == 0 or tensor.is_complex():
            return torch.ones_like(tensor)
        return -1000 * (tensor + 1) if tensor.is_floating_point() else torch.full_like(tensor, int(tensor.max()))

    return [tuple(make(t) for t in tensors) for make in (drawn, drawn, small, large)]


def _held_elsewhere(module: Any, runs: Sequence[_Run], place: Place, frozen: Sequence[Any]) -> str:
    """What the example's answers lead to for inputs that have others: "wrong" outputs, or the "same".

    "unseen" where no inputs have others.
    """
    kind = "unseen"
    for given, expected, seen in runs:
        if place not in seen or _equal_answers(seen[place], frozen):
            continue
        kind = "same"
        try:
            outputs, _ = _watched(module, given, (place, lambda _, number: frozen[min(number, len(frozen) - 1)]))
        except Exception:  # noqa: BLE001 - an answer that does not fit these inputs
            return "wrong"
        if not _all_close(outputs, expected):
            return "wrong"
    return kind


def _equal_answers(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first, second, strict=True)
    )


def _other_outcome(module: Any, tensors: tuple[Any, ...], place: Place, expected: tuple[Any, ...]) -> str:
    """What other answers lead to: "wrong" outputs, the "same" ones, or a "check" that raises."""
    found = {_outcome(module, tensors, (place, _once(change)), expected) for change in _OTHERS}
    return next(kind for kind in ("wrong", "check", "same") if kind in found)


def _once(change: Callable[[Any], Any]) -> Callable[[Any, int], Any]:
    """Change the first answer only."""
    return lambda value, number: value if number else _another(value, change)


def _outcome(module: Any, tensors: tuple[Any, ...], flip: _Flip, expected: tuple[Any, ...]) -> str:
    try:
        outputs, _ = _watched(module, tensors, flip)
    except Exception as exc:  # noqa: BLE001 - whatever the user's code raises on a path that it did not take
        step = exc.__traceback__
        while step is not None and step.tb_next is not None:
            step = step.tb_next
        text = linecache.getline(step.tb_frame.f_code.co_filename, step.tb_lineno) if step is not None else ""
        return "check" if text.lstrip().startswith(("raise", "assert")) else "wrong"
    return "same" if _all_close(outputs, expected) else "wrong"


def _all_close(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not a.dtype.is_floating_point:
            if not bool((a == b).all()):
                return False
            continue
        x, y = a.double(), b.double()
        scale = float(y.abs().nan_to_num(0, 0, 0).max()) if y.numel() else 0.0
        if not x.allclose(y, rtol=1e-4, atol=1e-4 * scale, equal_nan=True):
            return False
    return True


def _watched(module: Any, tensors: tuple[Any, ...], flip: _Flip | None) -> tuple[tuple[Any, ...], _Watch]:
    """Run the module; tell the outputs, where Python saw values of inputs, and whether sizes depend on such values.

    Args:
        module: The flat module.
        tensors: Its inputs.
        flip: A place whose answers are changed, and how.
    """
    torch = require("torch", extra="torch")
    given = tuple(t.clone() for t in tensors)
    values, calls, watch = _make_watch(given, flip)
    with torch.no_grad(), calls, values:
        outputs = module(*given)
    return tuple(outputs), watch


class _Watch:
    """What was seen, and the memory that holds values of the inputs."""

    def __init__(self, given: tuple[Any, ...], flip: _Flip | None) -> None:
        self.seen: dict[Place, list[Any]] = {}
        self.data_sizes = False
        self._flip = flip
        self._marks: dict[int, Any] = {}
        for tensor in given:
            self.mark(tensor)

    def mark(self, tensor: Any) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        storage = tensor.untyped_storage()
        # Weak, so that the memory is given back; yet while the reference lives, no other storage gets its address.
        self._marks[storage._cdata] = StorageWeakRef(storage)

    def marked(self, tensor: Any) -> bool:
        return tensor.untyped_storage()._cdata in self._marks

    def answered(self, value: Any) -> Any:
        """Write down that Python got ``value``; give another one at the place that is tried out."""
        place = user_place(sys._getframe(1))
        if place is None:
            return value
        answers = self.seen.setdefault(place, [])
        answers.append(copy.copy(value))
        if self._flip is None or place != self._flip[0]:
            return value
        return self._flip[1](value, len(answers) - 1)


def _another(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, list):
        return [_another(item, change) for item in value]
    if isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b":
        return value ^ True
    return change(value)


def _make_watch(given: tuple[Any, ...], flip: _Flip | None) -> tuple[Any, Any, _Watch]:
    """A mode for operators, and one for the methods that copy values to Python without an operator."""
    torch = require("torch", extra="torch")
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    watch = _Watch(given, flip)
    # Their results have the input's shape, not its values.
    blind = ("zeros_like", "ones_like", "empty_like", "full_like", "new_", "rand_like", "randn_like")
    copies = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)

    def tensors_in(nest: Any) -> list[Any]:
        return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, torch.Tensor)]

    class Values(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if not any(watch.marked(t) for t in tensors_in((args, kwargs))):
                return out
            if func.name().partition("::")[2].startswith(blind):
                return out
            if isinstance(out, bool | int | float):
                return watch.answered(out)
            watch.data_sizes |= torch.Tag.dynamic_output_shape in func.tags
            written = [
                value
                for value, argument in zip(args, func._schema.arguments, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            for tensor in tensors_in((out, written)):
                watch.mark(tensor)
            return out

    class Calls(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return watch.answered(out) if func in copies and watch.marked(args[0]) else out

    return Values(), Calls(), watch
