"""The tree of errors, and what they look like to a person."""

from __future__ import annotations

import errno
import inspect
import pickle
import re

import pytest

from deploykit import errors
from deploykit.errors import DeploykitError, StorageError, first_line, storage_error

CLASSES = [
    c
    for c in vars(errors).values()
    if inspect.isclass(c) and issubclass(c, Exception) and c.__module__ == errors.__name__
]


def drawn() -> dict[str, str]:
    """Parent by class, as drawn in the docstring."""
    parents: dict[str, str] = {}
    stack: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"((?:│   |    )*(?:[├└]── )?)(\w+(?:Error))\b", line)
        if match is None:
            continue
        depth = len(match[1]) // 4
        del stack[depth:]
        if stack:
            parents[match[2]] = stack[-1]
        stack.append(match[2])
    return parents


def test_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    real = {c.__name__: c.__base__.__name__ for c in CLASSES if c is not DeploykitError and c.__base__}
    assert drawn() == real
    assert len(real) > 10


@pytest.mark.parametrize("cls", CLASSES)
def test_message_is_one_line(cls: type[DeploykitError]) -> None:
    exc = cls("first\nsecond.", expected="a\tb\n", hint="do\r\nthis;")
    assert str(exc) == "first second; expected a b; do this"
    assert str(cls("just this")) == "just this"
    assert cls.__doc__


@pytest.mark.parametrize("cls", CLASSES)
def test_survives_a_process_boundary(cls: type[DeploykitError]) -> None:
    exc = cls("what", expected="that", hint="do")
    again = pickle.loads(pickle.dumps(exc))
    assert type(again) is cls
    assert (again.what, again.expected, again.hint) == ("what", "that", "do")
    assert str(again) == str(exc)


def test_message_holds_no_control_characters() -> None:
    text = str(DeploykitError("file \x1b[2J\x00 \u202e \udcff é 漢"))
    assert text == r"file \x1b[2J\x00 \u202e \udcff é 漢"


def test_first_line() -> None:
    assert first_line(ValueError("\n\n  one  \ntwo")) == "ValueError: one"
    assert first_line(KeyError()) == "KeyError"
    long = first_line(ValueError("x" * 1000), limit=50)
    assert len(long) == 50
    assert long.endswith("...")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES])
def test_storage_error(number: int) -> None:
    error = storage_error(OSError(number, "why"), "/some/where")
    assert isinstance(error, StorageError)
    assert "cannot write /some/where: why" in str(error)


@pytest.mark.parametrize("exc", [OSError("no number"), FileNotFoundError(errno.ENOENT, "x"), OSError(errno.EBADF, "x")])
def test_what_is_no_storage_error(exc: OSError) -> None:
    assert storage_error(exc, "/some/where") is None
