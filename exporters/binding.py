"""Example inputs bound to `forward`: flat names for the tensors, everything else held fixed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploykit import nesting
from deploykit.data import ValueRange, generate
from deploykit.errors import SourceError, first_line
from deploykit.exporters import torch_onnx
from deploykit.exporters.base import ExportOptions
from deploykit.exporters.shapes import parse_input
from deploykit.extras import require
from deploykit.specs import Array

_SIZE_GUESS = {"batch": 2, "sequence": 16, "height": 64, "width": 64}


@dataclass(frozen=True, slots=True)
class Call:
    """How a flat list of named tensors becomes a call of the module.

    Attributes:
        names: Input names, in order.
        positional: How many of them are passed by position; the others by keyword.
        constants: Keyword arguments that are no tensors, held fixed.
        args: Positional arguments with a `nesting.Slot` for every tensor; with ``kwargs``, in place of ``positional``
            and ``constants``.
        kwargs: Keyword arguments in the same form.
        fixed: Constants of the example, as `name=value`.
    """

    names: tuple[str, ...]
    positional: int
    constants: Mapping[str, Any]
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] | None = None
    fixed: tuple[str, ...] = ()

    def arguments(self, tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call with ``tensors``, given in the order of ``names``."""
        if self.args is None and self.kwargs is None:
            tail = dict(zip(self.names[self.positional :], tensors[self.positional :], strict=True))
            return tuple(tensors[: self.positional]), {**tail, **self.constants}
        args = tuple(nesting.join(item, tensors) for item in self.args or ())
        return args, {name: nesting.join(item, tensors) for name, item in (self.kwargs or {}).items()}


def parameters_of(module: Any) -> inspect.Signature:
    """The signature of `forward`; of a TorchScript module, that of its schema."""
    torch = require("torch", extra="torch")
    if not isinstance(module, torch.jit.ScriptModule):
        return inspect.signature(module.forward)
    kind, none = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    taken = [(a.name, a.default_value if a.has_default_value() else none) for a in module.forward.schema.arguments[1:]]
    return inspect.Signature([inspect.Parameter(name, kind, default=default) for name, default in taken])


def bind_examples(
    module: Any, given: Any, label: str, keywords: Mapping[str, Any] | None = None
) -> tuple[dict[str, Array], Call]:
    """Name the example inputs after the parameters of `forward`, and after the keys on the way to nested tensors.

    Args:
        module: The module.
        given: A tensor; a tuple or list of arguments; a dictionary of keyword arguments. A NamedTuple, a dataclass, and
            a list or a dictionary that does not fit `forward` as several arguments are the one argument.
        label: For messages.
        keywords: Keyword arguments beside ``given``.

    Raises:
        SourceError: They cannot be bound to `forward`, or hold something that cannot be an input of a graph.
    """
    signature = parameters_of(module)
    bound = _bind(signature, given, dict(keywords or {}), label)
    found: list[tuple[nesting.Path, Any]] = []
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    fixed: list[str] = []
    by_name = False
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            args += [nesting.split(item, (name, str(i)), found, label) for i, item in enumerate(value)]
        elif kind is inspect.Parameter.VAR_KEYWORD:
            kwargs |= {key: nesting.split(item, (key,), found, label) for key, item in value.items()}
        else:
            template = nesting.split(value, (name,), found, label)
            fixed += [f"{path}={constant!r:.60}" for path, constant in nesting.constants(template, (name,))]
            # A parameter that was left out ends what can go by position.
            by_name = by_name or kind is inspect.Parameter.KEYWORD_ONLY or len(args) != _place(signature, name)
            if by_name:
                kwargs[name] = template
            else:
                args.append(template)
    if not found:
        raise SourceError(
            f"the example inputs of {label} hold no tensor",
            expected="a tensor, a tuple or a dictionary of them",
        )
    names = nesting.names_of((path for path, _ in found), default="input")
    arrays = {n: torch_onnx.to_numpy(value) for n, (_, value) in zip(names, found, strict=True)}
    return arrays, Call(tuple(names), 0, {}, tuple(args), kwargs, tuple(fixed))


def _place(signature: inspect.Signature, name: str) -> int:
    return list(signature.parameters).index(name)


def _bind(signature: inspect.Signature, given: Any, keywords: dict[str, Any], label: str) -> inspect.BoundArguments:
    plain = isinstance(given, list | tuple) and not hasattr(given, "_fields")
    attempts: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    if plain:
        attempts.append((tuple(given), keywords))
    if isinstance(given, Mapping) and all(isinstance(key, str) for key in given):
        attempts.append(((), {**given, **keywords}))
    if not isinstance(given, tuple) or not plain:
        attempts.append(((given,), keywords))
    failure: TypeError | None = None
    for args, kwargs in attempts:
        try:
            return signature.bind(*args, **kwargs)
        except TypeError as exc:
            failure = failure or exc
    raise SourceError(
        f"the example inputs of {label} do not fit forward{signature} ({first_line(failure or TypeError())})",
        hint="mend the example inputs, or --input",
    ) from failure


def made_up_examples(
    module: Any, options: ExportOptions, label: str
) -> tuple[dict[str, Array], Call, dict[str, ValueRange]]:
    """Example inputs from `--input`, for a module that comes without.

    Raises:
        SourceError: There is no `--input`, or they do not fit `forward`.
    """
    if not options.inputs:
        parameters = ", ".join(parameters_of(module).parameters) or "x"
        name = parameters.split(",")[0]
        raise SourceError(
            f"{label} gives a module without example inputs (its forward takes: {parameters})",
            expected="(module, example_inputs) from the factory, or --input for every input",
            hint=f"add for example: --input '{name}=float32[batch,3,224,224]'",
        )
    parsed = [parse_input(text) for text in options.inputs]
    specs = [spec for spec, _ in parsed]
    ranges = {spec.name: limits for spec, limits in parsed if limits is not None}
    sizes = {s: options.dims.get(s, _SIZE_GUESS.get(s, 16)) for spec in specs for s in spec.symbols}
    arrays = generate(specs, sizes, ranges=ranges)
    given = {n: torch_onnx.from_numpy(a) for n, a in arrays.items()}
    variadic = [p.name for p in parameters_of(module).parameters.values() if p.kind is inspect.Parameter.VAR_POSITIONAL]
    if variadic and all(name.startswith(f"{variadic[0]}_") for name in given):
        bound, call = bind_examples(module, tuple(given.values()), label)
    else:
        bound, call = bind_examples(module, (), label, given)
    return bound, call, ranges
