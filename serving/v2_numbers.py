"""Long lists of numbers in JSON, flat or nested, read and written in pieces, so that other threads come in between.

A JSON parser holds the interpreter's lock from the first byte of a text to its last: in a thread, too, it would keep
the event loop from everything else, for half a second where a text has 64 MiB. Nearly all of such a text is one list of
numbers under the key "data". It is cut out before the rest is parsed, with a mark in its place, and read some thousand
values at a time. Lists that hold strings stay where they are.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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
_BEGIN = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*(?=\[)")
# A request has a list for each of its tensors; a text may repeat the key for ever.
_MOST_KEYS = 1024
_NOT_SIGNS = bytes(set(range(256)) - set(b"[],"))


@dataclass(frozen=True, slots=True)
class Numbers:
    """A list in a text, with its brackets.

    Attributes:
        text: All of it.
        begin: Where the list begins.
        end: Where it has ended.
    """

    text: bytes
    begin: int
    end: int

    @property
    def nested(self) -> bool:
        """Whether there are lists in it."""
        return self.text.find(b"[", self.begin + 1, self.end) >= 0

    def pieces(self, dims: Sequence[int], misfit: InvalidRequest) -> Iterator[list[Any]]:
        """The values in row-major order, some at a time.

        The list is cut at commas. To each piece the brackets are added that are open at its ends, so that a parser sees
        whether it is well-formed; that brackets and commas are those of the dimensions is seen by comparing them.

        Args:
            dims: How the list has to be nested.
            misfit: Raised where it is not.

        Raises:
            InvalidRequest: It is no JSON, or of other dimensions.
        """
        if not self._has_signs_for(dims):
            raise misfit
        expected, left = _signs(dims), math.prod(dims)
        at, depth, seen = self.begin, 0, 0
        while at < self.end:
            cut = self.text.find(b",", at + _PIECE_BYTES, self.end)
            stop = self.end if cut < 0 else cut
            piece = self.text[at:stop]
            signs = piece.translate(None, _NOT_SIGNS)
            if not expected.startswith(signs + (b"," if cut >= 0 else b""), seen):
                raise misfit
            opened, depth = depth, depth + signs.count(b"[") - signs.count(b"]")
            level = _loads(b"[" * opened + piece + b"]" * depth)
            for _ in dims[1:]:
                if set(map(type, level)) - {list}:
                    raise misfit
                level = list(chain.from_iterable(level))
            # By its signs, a list of one value could also be an empty one; and where the list is cut, a value that is
            # missing passes for one.
            left -= len(level)
            if left < 0:
                raise misfit
            yield level
            seen += len(signs) + 1
            at = stop + 1
            if cut >= 0:
                time.sleep(_PAUSE_S)
        if left:
            raise misfit

    def _has_signs_for(self, dims: Sequence[int]) -> bool:
        lists, commas, level = 0, 0, 1
        for dim in dims:
            lists, commas, level = lists + level, commas + level * max(0, dim - 1), level * dim
        found = (self.text.count(sign, self.begin, self.end) for sign in (b"[", b"]", b","))
        return tuple(found) == (lists, lists, commas)


def _signs(dims: Sequence[int]) -> bytes:
    """The brackets and commas of a list of some dimensions."""
    signs = b""
    for dim in reversed(dims):
        signs = b"[%b]" % ((signs + b",") * (dim - 1) + signs if dim else b"")
    return signs


def _loads(text: bytes) -> list[Any]:
    try:
        found: list[Any] = require("orjson", extra="serve").loads(text)
    except ValueError:
        raise InvalidRequest("the body is not JSON: a list of numbers holds something else") from None
    return found


def set_aside(text: bytes) -> tuple[bytes, dict[int, Numbers]]:
    """A text without its long lists of numbers.

    In JSON a quotation mark within a string has a backslash before it, so that `"data"` with a colon and a bracket
    behind it is a key and the beginning of its value. What is cut out begins at that bracket; it holds no brace and no
    quotation mark, and ends at the last closing bracket before the next of those, between which there are blanks and a
    comma at most. So the rest is JSON exactly where the whole is, but for what stands in the lists, which is looked at
    when they are read.

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
        colon = _BEGIN.match(text, at + len(_KEY))
        escaped = text[at - 1 : at] == b"\\"
        at += len(_KEY)
        if colon is None or escaped:
            continue
        begin = colon.end()
        stop = len(text)
        for sign in (b'"', b"}"):
            place = text.find(sign, begin, stop)
            stop = stop if place < 0 else place
        end = text.rfind(b"]", begin, stop) + 1
        if end - begin < LEAST_BYTES or text.find(b"{", begin, stop) >= 0 or text[end:stop].strip(b", \t\r\n"):
            continue
        mark = secrets.randbits(62)
        parts += (text[kept:begin], b"%d" % mark)
        found[mark] = Numbers(text, begin, end)
        kept = at = end
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
