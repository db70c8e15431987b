"""Recipes: TOML, one table a step, in the order in which they run.

    [export]                          # the table's name is the step's name, and its folder below the output
    source = "model.py:make"

    [int8]
    step = "quantize-static"          # which step; by default the table's name
    model = "export"                  # an earlier step, or a path; by default the step before
    data = "calib.npz"

    [benchmark]
    models = ["export", "int8"]       # by default all earlier ones
    data = "eval.npz"

Paths are relative to the recipe's folder. Every command prints the recipe that it amounts to with `--dry-run`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deploykit.errors import RecipeError, first_line
from deploykit.recipe_steps import SOURCE_STEPS, STEPS, BenchmarkStep, Step

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
_LIMIT_BYTES = 1 << 20
_DOTS = 1000


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps by name, in order.

    Attributes:
        steps: The steps.
        folder: What relative paths are relative to.
    """

    steps: dict[str, Step]
    folder: Path

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file.

        Raises:
            RecipeError: Missing, no TOML, or a step that does not say what to do.
        """
        file = Path(path)
        try:
            raw = file.read_bytes()
        except OSError as exc:
            raise RecipeError(f"cannot read the recipe {file}: {exc.strerror or exc}", expected="a .toml file") from exc
        if len(raw) > _LIMIT_BYTES:
            raise RecipeError(f"{file} is larger than {_LIMIT_BYTES} bytes", expected="a recipe")
        if max((line.count(b".") for line in raw.splitlines()), default=0) > _DOTS:
            # Python's reader takes a time that grows with the square of a name's parts.
            raise RecipeError(f"{file} has a line of more than {_DOTS} dots", expected="a recipe")
        try:
            tables = tomllib.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as exc:  # TOMLDecodeError, and numbers of thousands of digits
            raise RecipeError(f"{file} is not TOML ({first_line(exc)})", hint="mend the file") from exc
        return cls.from_tables(tables, file.parent)

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any], folder: Path) -> Recipe:
        """Check tables, one a step.

        Raises:
            RecipeError: An unknown step, a missing or unknown key, or a reference to a step that is not there.
        """
        if not tables:
            raise RecipeError("the recipe is empty", expected="one table a step, like [export]")
        steps: dict[str, Step] = {}
        for name, table in tables.items():
            steps[name] = _read_step(name, table)
            _check_references(name, steps)
        return cls(steps, folder)

    def tables(self) -> dict[str, dict[str, Any]]:
        """The recipe with all its defaults, as tables."""
        return {
            name: {k: v for k, v in step.model_dump().items() if v is not None} for name, step in self.steps.items()
        }


def _read_step(name: str, table: Any) -> Step:
    if not _NAME.fullmatch(name) or name.endswith(".json"):
        raise RecipeError(f"step name {name!r}", expected="letters, digits, '-', '_' and '.', and no .json at the end")
    if not isinstance(table, dict):
        raise RecipeError(f"{name} is {type(table).__name__}, not a table", expected=f"[{name}]")
    kind = table.get("step", name)
    if not isinstance(kind, str) or kind not in STEPS:
        raise RecipeError(f"[{name}] is step {kind!r}", expected=f"step = one of {', '.join(STEPS)}")
    try:
        return STEPS[kind].model_validate(table)
    except ValidationError as exc:
        error = exc.errors()[0]
        key = ".".join(str(p) for p in error["loc"])
        known = ", ".join(STEPS[kind].model_fields)
        raise RecipeError(f"[{name}] {key}: {error['msg'].lower()}", expected=f"keys of {kind}: {known}") from exc


def _check_references(name: str, steps: Mapping[str, Step]) -> None:
    """The first step has to bring its own model; a benchmark is no model."""
    step = steps[name]
    before = [n for n, s in steps.items() if n != name and not isinstance(s, BenchmarkStep)]
    if isinstance(step, SOURCE_STEPS):
        return
    named = step.models if isinstance(step, BenchmarkStep) else [step.model] if step.model is not None else []
    if not named and not before:
        raise RecipeError(
            f"[{name}] has no model, and no step before it makes one", expected="model = a step or a path"
        )
    for reference in named:
        if reference in steps and isinstance(steps[reference], BenchmarkStep):
            raise RecipeError(
                f"[{name}] takes {reference!r}, which is a benchmark", expected="a step that makes a model"
            )


def dump(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables as TOML text."""
    blocks = []
    for name, table in tables.items():
        lines = [f"[{name}]"]
        lines += [f"{key} = {_value(value)}" for key, value in table.items() if value is not None]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {_value(v)}" for k, v in value.items()) + "}"
    # A JSON string is a TOML basic string, but for the escape of DEL.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
