"""Writing YAML that any reader takes for the same values: blocks, and strings in quotes unless they are words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# What no reader takes for a number, a truth, a null or a mark.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_/-]*")
_RESERVED = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})


def dump(value: Mapping[str, Any]) -> str:
    """Write a document.

    Args:
        value: Mappings, sequences, strings, numbers, booleans and None; keys are strings.
    """
    return "".join(f"{line}\n" for line in _block(value))


def dump_all(documents: Sequence[Mapping[str, Any]]) -> str:
    """Write several documents into one file."""
    return "---\n".join(dump(document) for document in documents)


def _block(value: Any) -> list[str]:
    if isinstance(value, Mapping) and value:
        lines = []
        for key, item in value.items():
            lines += _entry(f"{_scalar(str(key))}:", item, "  ")
        return lines
    if _is_list(value) and value:
        lines = []
        for item in value:
            inner = _block(item)
            lines += [f"- {inner[0]}", *(f"  {line}" for line in inner[1:])]
        return lines
    return [_scalar(value)]


def _entry(head: str, item: Any, indent: str) -> list[str]:
    if (isinstance(item, Mapping) or _is_list(item)) and item:
        return [head, *(indent + line for line in _block(item))]
    return [f"{head} {_scalar(item)}"]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _RESERVED
        return value if plain else json.dumps(value)
    if isinstance(value, Mapping):
        return "{}"
    if _is_list(value):
        return "[]"
    return json.dumps(value)
