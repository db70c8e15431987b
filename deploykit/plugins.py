"""Steps from other distributions: found by entry points, loaded only where their name is asked for.

A distribution offers objects in the groups `deploykit.exporters`, `deploykit.optimizers`, `deploykit.runtimes` and
`deploykit.metrics`. What such an object has to offer is written in `docs/extending.md`; the contracts as types are
`exporters.plugged.Exporter`, `optimizers.plugged.Step`, `runtimes.plugged.Runtime` and `benchmarks.metrics.Metric`.

Nothing is looked up before a name is asked for that is not ours, or all of them are listed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from deploykit.errors import DeploykitError, PluginError, first_line

KINDS = ("exporters", "optimizers", "runtimes", "metrics")
# Names that mean something already, or would be taken for it: no plugin can have them.
RESERVED: Mapping[str, frozenset[str]] = {
    "exporters": frozenset(
        {"pytorch", "pt2", "huggingface", "keras", "savedmodel", "tflite", "scikit-learn", "sklearn", "skops", "onnx"}
    ),
    "optimizers": frozenset(
        {
            "apply", "export", "simplify", "benchmark", "verify", "quantize", "quantize-dynamic", "quantize-static",
            "quantize-weights", "quantize-half", "quantize-repair", "quantize-sweep", "fuse", "optimize",
        }
    ),
    "runtimes": frozenset({"ort", "onnxruntime", "openvino", "ov", "torch", "torch-compile", "triton"}),
    "metrics": frozenset({"accuracy", "f1", "precision", "recall", "sqnr", "agreement"}),
}  # fmt: skip
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")


def _functions(*names: str) -> dict[str, tuple[str, Callable[[Any], bool]]]:
    return dict.fromkeys(names, ("a function", callable))


def _reads(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and set(value) <= {".onnx", ".xml", ".pt2"}


# What an object of each kind has to have: by attribute, in words and as a test.
_SHAPES: Mapping[str, Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
    "exporters": _functions("opens", "open"),
    "optimizers": {
        "config": ("a frozen dataclass", lambda v: isinstance(v, type) and _frozen(v)),
        "min_cosine": (
            "None or a number from -1 to 1",
            lambda v: v is None or (isinstance(v, int | float) and not isinstance(v, bool) and -1 <= v <= 1),
        ),
        **_functions("apply"),
    },
    "runtimes": {
        "reads": ("a tuple of .onnx, .xml or .pt2", _reads),
        "concurrent": ("True or False", lambda v: isinstance(v, bool)),
        **_functions("check", "open"),
    },
    "metrics": {
        "higher_is_better": ("True or False", lambda v: isinstance(v, bool)),
        "takes": ('"predictions" or "outputs"', lambda v: v in ("predictions", "outputs")),
        **_functions("score"),
    },
}


def _frozen(kind: type) -> bool:
    return bool(getattr(getattr(kind, "__dataclass_params__", None), "frozen", False))


@dataclass(frozen=True, slots=True)
class Plugin:
    """What a distribution announces; nothing of it is loaded yet.

    Attributes:
        kind: One of `KINDS`.
        name: How the user asks for it.
        value: Where it is: "package.module:object".
        distribution: Name of the distribution.
        version: Its version.
    """

    kind: str
    name: str
    value: str
    distribution: str
    version: str

    @property
    def tools(self) -> dict[str, str]:
        """For the lineage of what it took part in."""
        return {self.distribution: self.version}

    def __str__(self) -> str:
        return f"{self.kind.removesuffix('s')} {self.name!r} of {self.distribution} {self.version}"

    def load(self) -> Any:
        """Import it and look at its shape.

        Raises:
            PluginError: It does not load, or is not what its kind has to be.
        """
        if why := self.refusal:
            raise PluginError(f"the {self} {why}", hint=f"tell the makers of {self.distribution}")
        from importlib.metadata import EntryPoint

        try:
            found = EntryPoint(self.name, self.value, f"deploykit.{self.kind}").load()
        except Exception as exc:
            raise PluginError(
                f"the {self} does not load ({first_line(exc)})",
                hint=f"reinstall it, or remove it: pip uninstall {self.distribution}",
            ) from exc
        if isinstance(found, type):
            raise PluginError(f"the {self} is a class, {found.__name__}", expected="an object or a module")
        for name, (words, fits) in _SHAPES[self.kind].items():
            if not hasattr(found, name):
                raise PluginError(f"the {self} has no {name!r}", expected=words, hint="see docs/extending.md")
            if not fits(getattr(found, name)):
                raise PluginError(
                    f"{name!r} of the {self} is {getattr(found, name)!r}", expected=words, hint="see docs/extending.md"
                )
        return found

    @property
    def refusal(self) -> str:
        """Why its name cannot be used; empty where it can."""
        if self.name in RESERVED[self.kind]:
            return f"has the name of one of DeployKit's own {self.kind}"
        if not _NAME.fullmatch(self.name):
            return "has a name that is not lower-case letters, digits, '-' and '_'"
        twins = [p for p in installed(self.kind) if p.name == self.name]
        if len(twins) > 1:
            return f"is not the only one of that name: {' and '.join(sorted(p.distribution for p in twins))} have it"
        return ""

    @contextmanager
    def blamed(self, doing: str, error: type[DeploykitError] = PluginError) -> Iterator[None]:
        """Say who it was where its code fails; errors of ours pass.

        Raises:
            DeploykitError: Of type ``error``.
        """
        try:
            yield
        except DeploykitError:
            raise
        except Exception as exc:
            raise error(f"the {self} failed while it {doing} ({first_line(exc)})") from exc


@dataclass(frozen=True, slots=True)
class Status:
    """What the doctor says of a plugin; `problem` is empty where it can be used."""

    plugin: Plugin
    problem: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        found = self.plugin
        return {
            "kind": found.kind, "name": found.name, "distribution": found.distribution, "version": found.version,
            "object": found.value, "usable": not self.problem, "problem": self.problem,
        }  # fmt: skip


def installed(kind: str) -> tuple[Plugin, ...]:
    """All plugins of a kind that distributions announce, by name; also those that cannot be used."""
    return _installed(kind, tuple(sys.path))


@lru_cache(maxsize=32)
def _installed(kind: str, path: tuple[str, ...]) -> tuple[Plugin, ...]:
    """``path`` is what the answer depends on: looking through it takes milliseconds."""
    from importlib.metadata import entry_points

    found = []
    for entry in entry_points(group=f"deploykit.{kind}"):
        of = entry.dist
        name, version = ("an unknown distribution", "unknown") if of is None else (of.name, of.version)
        found.append(Plugin(kind, entry.name, entry.value, name, version))
    return tuple(sorted(set(found), key=lambda p: (p.name, p.distribution)))


def find(kind: str, name: str) -> Plugin | None:
    """The plugin of that name, not loaded; None where there is none, or the name is one of ours."""
    if name in RESERVED[kind]:
        return None
    return next((p for p in installed(kind) if p.name == name), None)


def names(kind: str) -> tuple[str, ...]:
    """Names of the plugins of a kind that may be asked for."""
    return tuple(dict.fromkeys(p.name for p in installed(kind) if p.name not in RESERVED[kind]))


def survey() -> tuple[Status, ...]:
    """Load every plugin and say which ones can be used."""
    rows = []
    for kind in KINDS:
        for plugin in installed(kind):
            try:
                plugin.load()
            except PluginError as exc:
                rows.append(Status(plugin, str(exc)))
            else:
                rows.append(Status(plugin, ""))
    return tuple(rows)
