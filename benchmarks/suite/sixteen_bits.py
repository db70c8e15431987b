"""Do runtimes have kernels for 16-bit activations? python benchmarks/suite/sixteen_bits.py

One matrix product and one convolution behind Q/DQ pairs, with 8-bit weights and activations of 8 bits, of 16 bits, or
of none. Printed are what each runtime executes them in, and the time against float32, from interleaved runs in this
process. Where 16 bits are no faster than float, an outlier layer is better left in float: that is more exact.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploykit.machine import inspect_machine
from deploykit.runtimes import open_session
from deploykit.runtimes.placement import is_compute

KINDS = {"float32": 0, "uint8": TensorProto.UINT8, "uint16": TensorProto.UINT16}
ROUNDS, SECONDS = 7, 0.3


def layer(op: str, activations: int) -> onnx.ModelProto:
    """A product `[1, 128, 768] x [768, 768]`, or a 3x3 convolution of 128 channels on 28 x 28."""
    draw = np.random.default_rng(0)
    shape, inner = ((768, 768), [1, 128, 768]) if op == "MatMul" else ((128, 128, 3, 3), [1, 128, 28, 28])
    weight = (draw.standard_normal(shape) / 30).astype(np.float32)
    axis = 1 if op == "MatMul" else 0
    nodes, stored, data, held = [], [], "x", "w"
    if activations:
        largest = np.abs(weight).max(axis=tuple(a for a in range(weight.ndim) if a != axis))
        scale = (largest / 127).astype(np.float32)
        spread = scale.reshape([-1 if a == axis else 1 for a in range(weight.ndim)])
        steps = 255 if activations == TensorProto.UINT8 else 65535
        middle = (steps + 1) // 2
        stored += [
            numpy_helper.from_array(np.rint(weight / spread).astype(np.int8), "wq"),
            numpy_helper.from_array(scale, "ws"), numpy_helper.from_array(np.zeros(len(scale), np.int8), "wz"),
            numpy_helper.from_array(np.float32(8 / steps), "s"),
            helper.make_tensor("z", activations, [], [middle]),
        ]  # fmt: skip
        nodes += [
            helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=axis),
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        ]
        data, held = "xd", "wd"
    else:
        stored.append(numpy_helper.from_array(weight, "w"))
    pads = {} if op == "MatMul" else {"pads": [1] * 4}
    made = "m" if activations and op == "Conv" else "y"
    nodes.append(helper.make_node(op, [data, held], [made], name="layer", **pads))
    if made != "y":
        nodes += [
            helper.make_node("QuantizeLinear", [made, "s", "z"], ["yq"]),
            helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
        ]
    out = [1, 128, 768] if op == "MatMul" else inner
    graph = helper.make_graph(
        nodes, "layer", [helper.make_tensor_value_info("x", TensorProto.FLOAT, inner)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)], stored,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def main() -> int:
    """Print a line for each layer and runtime."""
    print(inspect_machine())
    print(f"{'layer':7} {'runtime':13} {'activations':12} {'ratio':>6}  executed in")
    with tempfile.TemporaryDirectory(prefix="sixteen-") as folder:
        for op in ("MatMul", "Conv"):
            files = {}
            for name, kind in KINDS.items():
                files[name] = Path(folder) / f"{op}-{name}.onnx"
                onnx.save(layer(op, kind), files[name])
            for device in ("ort:cpu", "openvino:cpu"):
                compare(op, device, files)
    return 0


def compare(op: str, device: str, files: dict[str, Path]) -> None:
    """Time one layer in all its forms."""
    with open_session(files["float32"], device) as session:
        shape = session.signature.inputs[0].shape
    feeds = {"x": np.random.default_rng(1).standard_normal([int(d) for d in shape or ()], np.float32)}
    sessions = {}
    for name, file in files.items():
        try:
            sessions[name] = open_session(file, device)
            sessions[name].run(feeds)
        except Exception as exc:
            print(f"{op:7} {device:13} {name:12} {'':>6}  does not run: {str(exc)[:120]}")
            sessions.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            began, runs = time.perf_counter(), 0
            while time.perf_counter() - began < SECONDS:
                session.run(feeds)
                runs += 1
            times[name].append((time.perf_counter() - began) / runs)
    for name, session in sessions.items():
        ratio = np.median(np.asarray(times["float32"]) / np.asarray(times[name]))
        kernels = ", ".join(f"{n.op} {n.precision or '?'}" for n in session.executed() if is_compute(n.op))
        print(f"{op:7} {device:13} {name:12} {ratio:6.2f}  {kernels}")
        session.close()


if __name__ == "__main__":
    sys.exit(main())
