"""The front holds no runtime, and the package costs nothing until a part of it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

RUNTIMES = ["onnx", "onnxruntime", "openvino", "torch"]
SERVER = ["grpc", "orjson", "pydantic", "starlette", "uvicorn"]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("deploykit.serving", ["numpy", *SERVER, *RUNTIMES]), ("deploykit.serving.requests", [*SERVER, *RUNTIMES]),
        ("deploykit.serving.lifecycle", RUNTIMES), ("deploykit.serving.worker", ["grpc", "starlette", *RUNTIMES]),
    ],
)  # fmt: skip
def test_what_is_not_imported(module, absent):
    code = f"import sys, {module}; print(*(m for m in {absent} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_replay_golden_is_there_when_it_is_asked_for():
    from deploykit import serving

    assert callable(serving.replay_golden)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = serving.nothing
