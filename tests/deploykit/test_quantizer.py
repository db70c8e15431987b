"""How the quantizer opens models for its steps."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploykit.optimizers.base import SharedOpener
from deploykit.quantizer import DeviceOpener
from deploykit.runtimes import parse_device


@pytest.mark.parametrize(("device", "shares"), [("ort:cpu", True), ("openvino:cpu", False), ("ort:cuda", False)])
def test_calibration_may_use_every_core_where_the_runtime_allows(tmp_path, device, shares):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "graph", values[:1], values[1:])
    file = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    opener = DeviceOpener(parse_device(device))
    assert isinstance(opener, SharedOpener)
    run = opener.shared(file)
    assert (run is not None) == shares
    if run is not None:
        np.testing.assert_array_equal(run({"x": np.ones((1, 2), np.float32)})["y"], [[-1, -1]])
