import subprocess
import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def run_cli(tmp_path):
    """Run `python -m deploykit ...` in an empty folder."""

    def run(*args, preexec=None, timeout=300):
        done = subprocess.run(
            [sys.executable, "-m", "deploykit", *map(str, args)],
            capture_output=True, text=True, check=False, cwd=tmp_path, preexec_fn=preexec, timeout=timeout,
        )  # fmt: skip
        return SimpleNamespace(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)

    return run


@pytest.fixture
def conv_model(tmp_path):
    """A small residual convolutional net with a dynamic batch, and calibration data that fits it."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {
        "w0": rng.standard_normal((8, 3, 3, 3)) / 5,
        "w1": rng.standard_normal((8, 8, 3, 3)) / 8,
        "w2": rng.standard_normal((10, 8)) / 3,
        "b2": rng.standard_normal(10),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], pads=[1] * 4),
        helper.make_node("Identity", ["c1"], ["i1"]),
        helper.make_node("Add", ["i1", "r0"], ["a1"]),
        helper.make_node("GlobalAveragePool", ["a1"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    images = rng.standard_normal((40, 3, 12, 12)).astype(np.float32)
    np.savez(tmp_path / "calib.npz", x=images)
    np.savez(tmp_path / "labelled.npz", x=images, labels=rng.integers(0, 10, 40))
    return path
