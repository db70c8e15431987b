"""Steps of other distributions, ONNX -> ONNX; see `docs/extending.md`."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from deploykit.errors import OptimizationError, PluginError, first_line
from deploykit.optimizers.base import StepResult
from deploykit.plugins import Plugin, find, names

# What a field of a step's config may be, as a command line and a recipe can say it.
_FIELD_TYPES = (bool, int, float, str, tuple[str, ...])
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Step(Protocol):
    """What an entry point of `deploykit.optimizers` is.

    Attributes:
        config: A frozen dataclass, whose fields all have defaults and are bool, int, float, str or tuple[str, ...].
        min_cosine: None where the result gives the parent's numbers; else the smallest accepted cosine between an
            output and the parent's.
    """

    config: type[Any]
    min_cosine: float | None

    def apply(self, model: Path, config: Any, target: Path) -> StepResult:
        """Write the result to ``target``; ``model`` stays as it is.

        Raises:
            OptimizationError: It cannot be applied to this model.
        """


@dataclass(frozen=True, slots=True)
class PluggedStep:
    """A step of another distribution, loaded, with what was asked of it.

    Attributes:
        plugin: Whose it is.
        step: The object itself.
        config: An instance of its config.
    """

    plugin: Plugin
    step: Step
    config: Any

    @property
    def min_cosine(self) -> float | None:
        """See `Step`."""
        return self.step.min_cosine

    @property
    def params(self) -> dict[str, Any]:
        """For the lineage: its name and every option."""
        options = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        return {
            "name": self.plugin.name,
            "options": {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()},
        }

    def apply(self, model: Path, target: Path) -> StepResult:
        """Apply it.

        Raises:
            OptimizationError: It cannot be applied, or fails.
            PluginError: It wrote nothing, changed its input, or did not say what it did.
        """
        before = _stamp(model)
        with self.plugin.blamed(f"was applied to {model}", OptimizationError):
            done = self.step.apply(model, self.config, target)
        if not isinstance(done, StepResult):
            raise PluginError(f"the {self.plugin} returned {type(done).__name__}", expected="a StepResult")
        if not target.is_file():
            raise PluginError(f"the {self.plugin} wrote no model", expected="an ONNX file also where nothing changes")
        if _stamp(model) != before:
            raise PluginError(f"the {self.plugin} changed its input {model}", hint="export the model again")
        return replace(done, params=self.params | done.params, tools=done.tools | self.plugin.tools)


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def find_step(name: str, options: Mapping[str, Any]) -> PluggedStep:
    """Load a step and read its options.

    Args:
        name: As its distribution calls it.
        options: By the config's fields. Text is read as the field's type: `true`, `3`, `0.5`, `a,b`.

    Raises:
        OptimizationError: There is no such step, or an option does not fit.
        PluginError: It does not load, or its config cannot be used.
    """
    plugin = find("optimizers", name)
    if plugin is None:
        known = names("optimizers")
        raise OptimizationError(
            f"no installed distribution has a step {name!r}",
            expected=f"one of {', '.join(known)}" if known else "a distribution with a step to be installed",
            hint="run: deploykit doctor",
        )
    step: Step = plugin.load()
    types_by_field = _field_types(plugin, step.config)
    given = {}
    for key, value in options.items():
        if key not in types_by_field:
            raise OptimizationError(
                f"{name} has no option {key!r}",
                expected=f"one of {', '.join(types_by_field)}" if types_by_field else "none",
            )
        given[key] = _read(name, key, value, types_by_field[key])
    try:
        config = step.config(**given)
    except (TypeError, ValueError) as exc:
        raise OptimizationError(f"the options of {name} do not fit ({first_line(exc)})") from exc
    return PluggedStep(plugin, step, config)


def _field_types(plugin: Plugin, config: type[Any]) -> dict[str, Any]:
    """Type of every field that can be set.

    Raises:
        PluginError: One is of a type that nobody could write on a command line.
    """
    with plugin.blamed(f"described {config.__name__}"):
        hints = typing.get_type_hints(config)
    found = {f.name: hints[f.name] for f in fields(config) if f.init}
    for name, kind in found.items():
        if kind not in _FIELD_TYPES:
            raise PluginError(
                f"{config.__name__}.{name} of the {plugin} is {_word(kind)}",
                expected="bool, int, float, str or tuple[str, ...]",
            )
    return found


def _read(step: str, key: str, value: Any, kind: Any) -> Any:
    """An option as the type of its field.

    Raises:
        OptimizationError: It is not of that type.
    """
    wrong = OptimizationError(f"{key} of {step} is {value!r}", expected=_word(kind))
    if kind is bool:
        truth = value if isinstance(value, bool) else _TRUTHS.get(str(value).lower())
        if truth is None:
            raise wrong
        return truth
    if isinstance(kind, types.GenericAlias):  # tuple[str, ...]
        if isinstance(value, str):
            return tuple(part for part in value.split(",") if part)
        if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
            raise wrong
        return tuple(value)
    if kind is str:
        if not isinstance(value, str):
            raise wrong
        return value
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or isinstance(value, str) or (kind is float and isinstance(value, float))):
        raise wrong
    try:
        return kind(value)
    except ValueError as exc:
        raise wrong from exc


def _word(kind: Any) -> str:
    return str(kind) if isinstance(kind, types.GenericAlias) else getattr(kind, "__name__", str(kind))
