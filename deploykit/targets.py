"""Deployment targets: what `--for triton:24.08`, `--for ort:1.18` and `--for openvino:2024.6` stand for.

The facts, each with its source, are in `targets.toml`. A version that is not there is an error: nothing is guessed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from deploykit.errors import ContractError

_TABLE = Path(__file__).with_name("targets.toml")
_RUNTIMES = {"ort": "ONNX Runtime", "openvino": "OpenVINO", "triton": "Triton Inference Server"}
_ALIASES = {"onnxruntime": "ort", "ov": "openvino", "tritonserver": "triton"}
_NEAREST = 3


@dataclass(frozen=True, slots=True)
class Target:
    """One runtime at one version.

    Attributes:
        name: As the user wrote it, in its canonical form: "triton:24.08".
        runtime: "ort" or "openvino".
        version: The runtime's version, "1.18".
        opset: Newest opset of the default domain; None where nothing is known about a limit.
        ml_opset: Newest opset of `ai.onnx.ml`; None where nothing is known about a limit.
        ir_version: Newest IR version; None where nothing is known about a limit.
        contrib: Operators of `com.microsoft` that it knows.
        missing: Operators of the default domain that it lacks in every opset.
        ml: Operators of `ai.onnx.ml` that it knows; None for all that the opset has.
        sources: Where the facts come from.
        notes: What the user must know.
    """

    name: str
    runtime: str
    version: str
    opset: int | None
    ml_opset: int | None
    ir_version: int | None
    contrib: frozenset[str]
    missing: frozenset[str]
    ml: frozenset[str] | None
    sources: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        runtime = f"{_RUNTIMES[self.runtime]} {self.version}"
        return f"{self.name} ({runtime})" if self.name.startswith("triton") else runtime


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


def known_targets() -> list[str]:
    """Every name that `parse_target` takes, oldest first within a runtime."""
    return [f"{kind}:{version}" for kind in _RUNTIMES for version in sorted(_table()[kind], key=_key)]


def parse_targets(texts: Iterable[str]) -> tuple[Target, ...]:
    """Read several `--for`, each once.

    Raises:
        ContractError: As `parse_target`.
    """
    return tuple({t.name: t for t in map(parse_target, texts)}.values())


def parse_target(text: str) -> Target:
    """Read `runtime:version`.

    Raises:
        ContractError: No such runtime, or a version about which nothing is known.
    """
    kind, sep, version = text.strip().lower().partition(":")
    kind = _ALIASES.get(kind, kind)
    if kind not in _RUNTIMES or not sep or not re.fullmatch(r"\d+(\.\d+)*", version):
        raise ContractError(
            f"unknown target {text!r}", expected="triton:YY.MM, ort:VERSION or openvino:VERSION, like ort:1.18"
        )
    return _triton(version) if kind == "triton" else _runtime(kind, version, f"{kind}:{version}")


def _triton(version: str) -> Target:
    row = _row("triton", version)
    if "ort" not in row:
        raise ContractError(f"triton:{version}: {row['unknown']}", hint="name the runtime itself: --for ort:VERSION")
    found = _runtime("ort", row["ort"], f"triton:{version}")
    sources = (*_sources(row), *found.sources)
    notes = ("only its ONNX Runtime backend is meant; for its OpenVINO backend name openvino:VERSION too",)
    return replace(found, version=row["ort"], sources=tuple(dict.fromkeys(sources)), notes=notes)


def _runtime(kind: str, version: str, name: str) -> Target:
    # Patch releases change no opset and no operator.
    minor = ".".join(version.split(".")[:2])
    row = _row(kind, minor, asked=version)
    notes = [row["note"]] if "note" in row else []
    if kind == "ort":
        contrib = _until(_table()["contrib"], minor)
        missing: frozenset[str] = frozenset()
        ml = None
    else:
        contrib = frozenset(row["contrib"])
        patterns = _until(_table()["openvino_patterns"], minor)
        missing = frozenset(row["missing"]) - patterns
        if patterns:
            notes.append(f"{', '.join(sorted(patterns))} are read in certain patterns only, which is not checked")
        ml = frozenset(row["ml"])
        notes.append("no limit of opset or IR version is published, and none was found; operators are checked")
    return Target(
        name, kind, version, row.get("opset"), row.get("ml_opset"), row.get("ir"), contrib, missing, ml, _sources(row),
        tuple(notes),
    )  # fmt: skip


def _until(by_version: Mapping[str, Iterable[str]], version: str) -> frozenset[str]:
    """The operators of a table by first version that are there at a version."""
    return frozenset(op for since, ops in by_version.items() if _key(since) <= _key(version) for op in ops)


def _row(kind: str, version: str, asked: str | None = None) -> dict[str, Any]:
    rows: Mapping[str, dict[str, Any]] = _table()[kind]
    if version in rows:
        return rows[version]
    here = _key(version)
    near = sorted(rows, key=lambda known: _distance(_key(known), here))[:_NEAREST]
    raise ContractError(
        f"nothing is known about {kind}:{asked or version}",
        expected=f"a version in the table; the nearest are {', '.join(f'{kind}:{v}' for v in sorted(near, key=_key))}",
    )


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _distance(known: tuple[int, ...], asked: tuple[int, ...]) -> tuple[int, int]:
    a, b = (*known, 0, 0), (*asked, 0, 0)
    return abs(a[0] * 12 + a[1] - b[0] * 12 - b[1]), abs(a[0] - b[0])


def _sources(row: Mapping[str, Any]) -> tuple[str, ...]:
    names: Mapping[str, str] = _table()["sources"]
    return tuple(names[key] for key in row["source"])


def opset_limit(targets: Sequence[Target]) -> int | None:
    """The newest opset that all targets read; None where none of them is known to have a limit."""
    limits = [t.opset for t in targets if t.opset is not None]
    return min(limits) if limits else None


def choose_opset(targets: Sequence[Target], asked: int | None, default: int) -> int | None:
    """The opset to export: what was asked for, else the default or what the targets still read, whichever is lower.

    Raises:
        ContractError: The opset that was asked for is newer than a target reads.
    """
    limit = opset_limit(targets)
    if asked is not None:
        if limit is not None and asked > limit:
            strict = next(t for t in targets if t.opset == limit)
            raise ContractError(
                f"--opset {asked} contradicts --for {strict.name}", expected=f"opset {limit} or older",
                hint="leave --opset out",
            )  # fmt: skip
        return asked
    return None if limit is None else min(default, limit)


def first_with(target: Target, op: str, domain: str) -> str | None:
    """The first known version of a target's runtime, newer than it, that has an operator; None where there is none."""
    for version in sorted(_table()[target.runtime], key=_key):
        if _key(version) > _key(target.version):
            later = _runtime(target.runtime, version, f"{target.runtime}:{version}")
            if has_operator(later, op, domain):
                return later.name
    return None


def has_operator(target: Target, op: str, domain: str) -> bool:
    """Whether a runtime knows an operator of the standard's domains or of `com.microsoft`, in some form."""
    if domain == "com.microsoft":
        return op in target.contrib
    if domain == "ai.onnx.ml":
        return target.ml is None or op in target.ml
    return op not in target.missing
