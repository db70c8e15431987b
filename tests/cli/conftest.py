import subprocess
import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def run_cli(tmp_path):
    """Run `python -m deploykit ...` in an empty folder, in a process of its own."""

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
    return write_conv_model(tmp_path)


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """A folder in which `deploykit benchmark` measured that net and one that is wrong, with all that it writes.

    As its attributes: the folder as `path`, and what the process gave back.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    path = tmp_path_factory.mktemp("measured")
    model = onnx.load(str(write_conv_model(path)))
    for weight in model.graph.initializer:
        values = np.random.default_rng(7).standard_normal(tuple(weight.dims)).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, str(path / "wrong.onnx"))
    done = subprocess.run(
        [sys.executable, "-m", "deploykit", "benchmark", "-m", "net.onnx", "-m", "wrong.onnx", "--device", "ort:cpu",
         "--rounds", "3", "--seconds", "0.05", "--warmup", "0", "--data", "labelled.npz",
         "-o", "r.json", "--html", "r.html", "--markdown", "r.md"],
        capture_output=True, text=True, check=False, cwd=path, timeout=300,
    )  # fmt: skip
    return SimpleNamespace(path=path, returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)


def write_conv_model(folder):
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
    path = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    images = rng.standard_normal((40, 3, 12, 12)).astype(np.float32)
    np.savez(folder / "calib.npz", x=images)
    np.savez(folder / "labelled.npz", x=images, labels=rng.integers(0, 10, 40))
    return path
