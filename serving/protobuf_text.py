"""Writing the text format of protocol buffers: https://protobuf.dev/reference/protobuf/textformat-spec/"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Symbol(str):
    """The name of an enumeration's value, which is written without quotes."""

    __slots__ = ()


def dump(message: Mapping[str, Any]) -> str:
    """Write a message.

    Args:
        message: Fields by name: numbers, booleans, strings, symbols, mappings for messages, sequences of those for
            repeated fields.
    """
    return "".join(f"{line}\n" for line in _lines(message, ""))


def _lines(message: Mapping[str, Any], indent: str) -> list[str]:
    found = []
    for name, value in message.items():
        if isinstance(value, Mapping):
            found += _message(name, value, indent)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if all(isinstance(item, Mapping) for item in value):
                for item in value:
                    found += _message(name, item, indent)
            else:
                found.append(f"{indent}{name}: [{', '.join(map(_scalar, value))}]")
        else:
            found.append(f"{indent}{name}: {_scalar(value)}")
    return found


def _message(name: str, value: Mapping[str, Any], indent: str) -> list[str]:
    inner = _lines(value, indent + "  ")
    return [f"{indent}{name} {{", *inner, f"{indent}}}"] if inner else [f"{indent}{name} {{ }}"]


def _scalar(value: Any) -> str:
    if isinstance(value, Symbol):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quote(value)
    return repr(value)


def quote(text: str) -> str:
    """A string literal: what is not printable ASCII is written as octal bytes of its UTF-8."""
    made = []
    for byte in text.encode():
        char = chr(byte)
        if char in '"\\':
            made.append("\\" + char)
        elif 32 <= byte < 127:
            made.append(char)
        else:
            made.append(f"\\{byte:03o}")
    return f'"{"".join(made)}"'


def parameters(values: Mapping[str, str]) -> list[dict[str, Any]]:
    """A `map<string, string>` field."""
    return [{"key": key, "value": value} for key, value in values.items()]
