"""A folder that nothing may be read from, watched by the kernel; and models to attack with."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

WEIGHT = np.arange(4, dtype=np.float32)
_IN_ACCESS, _IN_OPEN, _IN_NONBLOCK, _IN_CLOEXEC = 0x1, 0x20, 0o4000, 0o2000000


class Watched:
    """A directory of whose files the kernel tells every opening and reading, by whatever library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        added = self._libc.inotify_add_watch(self._descriptor, os.fsencode(path), _IN_ACCESS | _IN_OPEN)
        assert self._descriptor >= 0 and added >= 0

    def touched(self) -> list[str]:
        """Names of files that were opened since the last time."""
        try:
            data = os.read(self._descriptor, 1 << 20)
        except BlockingIOError:
            return []
        names, at = [], 0
        while at < len(data):
            (length,) = struct.unpack_from("I", data, at + 12)
            names.append(data[at + 16 : at + 16 + length].rstrip(b"\0").decode())
            at += 16 + length
        return [name for name in names if name]

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Watched]:
    """The folder `secret` with `w.bin`, beside the folder `model`; at the end, nobody has opened anything in it."""
    outside = tmp_path / "secret"
    outside.mkdir()
    (outside / "w.bin").write_bytes(WEIGHT.tobytes())
    (tmp_path / "model").mkdir()
    watched = Watched(outside)
    yield watched
    assert not watched.touched()
    watched.close()


def make_model(nodes: Any = None, weights: Any = None, dims: Any = (4,), outputs: Any = ("y",), opset: int = 17) -> Any:
    """x + w, of four float32."""
    graph = helper.make_graph(
        nodes or [helper.make_node("Add", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in outputs],
        [numpy_helper.from_array(WEIGHT, "w")] if weights is None else weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.fixture(scope="session")
def model() -> Callable[..., Any]:
    """`model(nodes, weights, dims, outputs, opset)`."""
    return make_model
