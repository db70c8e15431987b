"""Tensors through shared memory: any dtype and strides, joined, and never beyond a limit."""

from __future__ import annotations

import json
import os
import sys

import ml_dtypes
import numpy as np
import pytest

from deploykit.serving.arenas import Arena, ArenaFull, Joined, read, write

BASE = np.arange(24, dtype=np.float32).reshape(4, 6)


def through(*tensors: Joined, limit: int = 2**20) -> dict[str, np.ndarray]:
    """Written by one side and read by another that has the same memory, told through JSON."""
    ours = Arena.create(limit)
    theirs = Arena(os.dup(ours.descriptor), limit)
    placed, total = write(ours, tensors)
    told = json.loads(json.dumps([placed, total]))
    found = {name: array.copy() for name, array in read(theirs, *told).items()}
    ours.close()
    theirs.close()
    return found


@pytest.mark.parametrize(
    "array",
    [
        BASE, BASE.T, BASE[::-1], BASE[:, ::2], BASE[1:1], np.broadcast_to(BASE[0], (5, 6)), np.float32(3).reshape(()),
        np.asfortranarray(BASE), BASE[..., None], np.zeros((0, 3), np.float32),
    ],
    ids=["plain", "transposed", "reversed", "steps", "empty", "broadcast", "scalar", "fortran", "axis", "none"],
)  # fmt: skip
def test_any_strides(array):
    found = through(Joined("x", "float32", (array,)))["x"]
    assert found.dtype == np.float32 and found.shape == array.shape
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    "dtype",
    ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float64",
     "complex64", "complex128"],
)  # fmt: skip
def test_any_dtype(dtype):
    array = BASE.astype(dtype)
    found = through(Joined("x", dtype, (array,)))["x"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_bfloat16_keeps_its_bits():
    array = BASE.astype(ml_dtypes.bfloat16)
    assert through(Joined("x", "bfloat16", (array.T,)))["x"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(through(Joined("x", "bfloat16", (array.T,)))["x"], array.T)
    np.testing.assert_array_equal(through(Joined("x", "bfloat16", (array.view(np.uint16),)))["x"], array)


def test_bytes_of_another_order_are_turned():
    np.testing.assert_array_equal(through(Joined("x", "float32", (BASE.astype(">f4"),)))["x"], BASE)


def test_strings():
    texts = np.array([["a", "", "übung"], [b"bytes", "\0", "x" * 1000]], object)
    found = through(Joined("x", "string", (texts,)))["x"]
    assert found.tolist() == [["a", "", "übung"], ["bytes", "\0", "x" * 1000]]
    assert through(Joined("x", "string", (np.array(["ab", "c"]),)))["x"].tolist() == ["ab", "c"]


def test_parts_are_joined_by_rows():
    strings = np.array([["p"], ["q"]], object)
    found = through(
        Joined("x", "float32", (BASE, BASE[::2], BASE[:1])),
        Joined("s", "string", (strings, strings[::-1], strings[:1])),
    )
    np.testing.assert_array_equal(found["x"], np.concatenate([BASE, BASE[::2], BASE[:1]]))
    assert found["s"].tolist() == [["p"], ["q"], ["q"], ["p"], ["p"]]


def test_the_memory_grows_and_never_beyond_its_limit():
    arena = Arena.create(2**20)
    small = np.ones(10, np.uint8)
    write(arena, [Joined("x", "uint8", (small,))])
    before = arena.view(0, np.dtype(np.uint8), (10,))
    placed, total = write(arena, [Joined("x", "uint8", (np.full(2**20, 7, np.uint8),))])
    assert read(arena, placed, total)["x"].sum() == 7 * 2**20
    assert before.sum() == 70  # the same memory, by its old mapping
    with pytest.raises(ArenaFull, match="allowed"):
        write(arena, [Joined("x", "uint8", (np.zeros(2**20 + 1, np.uint8),))])


@pytest.mark.skipif(sys.platform != "linux", reason="how many pages a file has is Linux's to tell")
def test_memory_that_is_warm_is_there_for_both_sides_before_it_is_written():
    ours = Arena.create(2**22)
    theirs = Arena(os.dup(ours.descriptor), 2**22)

    def pages():
        return os.fstat(ours.descriptor).st_blocks * 512

    ours.warm(2**20 + 1)
    there = pages()
    assert there >= 2**20 + 1
    # The other side needs less at first, and cannot make it smaller.
    placed, total = write(theirs, [Joined("x", "uint8", (np.full(10, 7, np.uint8),))])
    assert read(ours, placed, total)["x"].sum() == 70
    write(theirs, [Joined("x", "uint8", (np.full(2**20, 7, np.uint8),))])
    assert pages() == there
    ours.warm(2**40)  # no more than its limit
    assert os.fstat(ours.descriptor).st_size == 2**22


def test_what_the_other_side_says_is_checked():
    arena = Arena.create(2**20)
    write(arena, [Joined("x", "uint8", (np.ones(10, np.uint8),))])
    with pytest.raises(ArenaFull):
        read(arena, [("x", "uint8", [2**16 + 1], 0, 2**16 + 1)], 10)
    with pytest.raises(ArenaFull):
        read(arena, [("x", "uint8", [10], -5, 10)], 10)
    with pytest.raises(ArenaFull):
        read(arena, [("x", "uint8", [10], 0, 10)], 2**30)


@pytest.mark.skipif(sys.platform != "linux", reason="files that cannot shrink are Linux's")
def test_the_other_side_cannot_take_memory_away():
    arena = Arena.create(2**20)
    write(arena, [Joined("x", "uint8", (np.ones(10, np.uint8),))])
    with pytest.raises(PermissionError):
        os.ftruncate(arena.descriptor, 0)


def test_what_a_large_request_took_is_given_back():
    arena = Arena.create(2**28)
    whole = np.ones(2**27, np.uint8)
    for array, kept in ((whole, 2**26), (whole[:100], 2**26), (whole, 2**26)):
        placed, total = write(arena, [Joined("x", "uint8", (array,))])
        np.testing.assert_array_equal(read(arena, placed, total)["x"], array)
        arena.trim()
        assert os.fstat(arena.descriptor).st_blocks * 512 <= kept
    with pytest.raises(ArenaFull):
        arena.reserve(2**29)
    arena.trim()
    arena.close()
    small = Arena.create(2**17)
    with pytest.raises(ArenaFull):
        small.reserve(2**29)
    small.trim()
    small.close()
