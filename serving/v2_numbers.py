"""Long flat lists of numbers in JSON, read and written in pieces, so that other threads come in between.

A JSON parser holds the interpreter's lock from the first byte of a text to its last: in a thread, too, it would keep
the event loop from everything else, for half a second where a text has 64 MiB. Nearly all of such a text is one list of
numbers under the key "data". It is cut out before the rest is parsed, with a mark in its place, and read some thousand
values at a time. Lists that are nested or hold strings stay where they are.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deploykit.extras import require
from deploykit.serving.requests import InvalidRequest
from deploykit.specs import Array

# Shorter lists are not worth it; a piece takes about a millisecond.
LEAST_BYTES = 256 * 1024
_PIECE_BYTES = 128 * 1024
_PIECE_VALUES = 16 * 1024
# Long enough that who waits for the lock gets it.
_PAUSE_S = 5e-5

_KEY = b'"data"'
_BEGIN = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*\[")
# A request has a list for each of its tensors; a text may repeat the key for ever.
_MOST_KEYS = 1024


@dataclass(frozen=True, slots=True)
class Numbers:
    """The inside of a list in a text, without its brackets.

    Attributes:
        text: All of it.
        begin: Where the list's first value begins.
        end: Where its closing bracket is.
    """

    text: bytes
    begin: int
    end: int

    def pieces(self) -> Iterator[list[Any]]:
        """The values, some at a time.

        Raises:
            InvalidRequest: It is no JSON.
        """
        loads = require("orjson", extra="serve").loads
        at, whole = self.begin, True
        while True:
            cut = self.text.find(b",", at + _PIECE_BYTES, self.end) if at + _PIECE_BYTES < self.end else -1
            whole = whole and cut < 0
            piece = self.text[at : self.end if cut < 0 else cut]
            # A list may be empty. A value in it may not.
            if not whole and (not piece or piece.isspace()):
                raise InvalidRequest("the body is not JSON: a value is missing")
            try:
                yield loads(b"[%b]" % piece)
            except ValueError:
                raise InvalidRequest("the body is not JSON: a list of numbers holds something else") from None
            if cut < 0:
                return
            at = cut + 1
            time.sleep(_PAUSE_S)


def set_aside(text: bytes) -> tuple[bytes, dict[int, Numbers]]:
    """A text without its long flat lists of numbers.

    In JSON a quotation mark within a string has a backslash before it, so that `"data"` with a colon and a bracket
    behind it is a key and the beginning of its value. What is cut out begins at that bracket and ends at the first
    closing one; it holds no further bracket, brace or quotation mark. So the rest is JSON exactly where the whole is,
    but for what stands in the lists, which is looked at when they are read.

    Args:
        text: JSON, or not.

    Returns:
        The text with a number in place of each list, and the lists by those numbers, which nobody can guess.
    """
    parts: list[bytes] = []
    found: dict[int, Numbers] = {}
    kept = at = 0
    for _ in range(_MOST_KEYS):
        at = text.find(_KEY, at)
        if at < 0:
            break
        begin = _BEGIN.match(text, at + len(_KEY))
        escaped = text[at - 1 : at] == b"\\"
        at += len(_KEY)
        if begin is None or escaped:
            continue
        start = begin.end()
        limit = text.find(b'"', start)
        end = text.find(b"]", start, len(text) if limit < 0 else limit)
        if end - start < LEAST_BYTES or text.find(b"[", start, end) >= 0 or text.find(b"{", start, end) >= 0:
            continue
        mark = secrets.randbits(62)
        parts += (text[kept : start - 1], b"%d" % mark)
        found[mark] = Numbers(text, start, end)
        kept = at = end + 1
    if not found:
        return text, found
    return b"".join((*parts, text[kept:])), found


def dump_numbers(flat: Array) -> bytes:
    """A one-dimensional array as a JSON list; what is not finite becomes null."""
    orjson = require("orjson", extra="serve")
    parts = []
    for at in range(0, max(1, len(flat)), _PIECE_VALUES):
        if at:
            time.sleep(_PAUSE_S)
        parts.append(orjson.dumps(flat[at : at + _PIECE_VALUES], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
    return b"[%b]" % b",".join(parts)
