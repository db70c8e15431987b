"""Two graphs differ: is the very node named that was made wrong?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.benchmarks import bisection
from deploykit.benchmarks.bisect_finding import Finding
from deploykit.benchmarks.bisect_report import save_finding
from deploykit.benchmarks.bisection import bisect_models
from deploykit.errors import OutputExistsError
from deploykit.modelfile import read_model
from deploykit.runtimes import parse_device

ORT, OPENVINO = parse_device("ort:cpu"), parse_device("openvino:cpu")
WIDTH, LAYERS = 16, 6
Model = onnx.ModelProto


def build(nodes: list[Any], weights: dict[str, Any], outputs: dict[str, int], inputs: dict[str, Any]) -> Model:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * rank) for n, rank in outputs.items()],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def deep_net() -> Model:
    """Six residual blocks of LayerNormalization, MatMul, Erf and Softmax, with names after the blocks."""
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {"ten": np.float32(10)}
    nodes = []
    last = "x"
    for i in range(LAYERS):
        weights |= {
            f"w{i}": (rng.standard_normal((WIDTH, WIDTH)) / 4).astype(np.float32),
            f"b{i}": rng.standard_normal(WIDTH).astype(np.float32) / 10,
            f"g{i}": rng.uniform(0.5, 1.5, WIDTH).astype(np.float32),
        }
        nodes += [
            helper.make_node("LayerNormalization", [last, f"g{i}"], [f"ln{i}"], name=f"norm{i}", epsilon=1e-5),
            helper.make_node("MatMul", [f"ln{i}", f"w{i}"], [f"mm{i}"], name=f"matmul{i}"),
            helper.make_node("Add", [f"mm{i}", f"b{i}"], [f"add{i}"], name=f"add{i}"),
            helper.make_node("Erf", [f"add{i}"], [f"erf{i}"], name=f"erf{i}"),
            helper.make_node("Transpose", [f"erf{i}"], [f"t{i}"], name=f"turn{i}", perm=[0, 2, 1]),
            helper.make_node("Softmax", [f"t{i}"], [f"soft{i}"], name=f"soft{i}", axis=-1),
            helper.make_node("Transpose", [f"soft{i}"], [f"u{i}"], name=f"back{i}", perm=[0, 2, 1]),
            helper.make_node("Mul", [f"u{i}", "ten"], [f"large{i}"], name=f"large{i}"),
            helper.make_node("Add", [f"large{i}", last], [f"out{i}"], name=f"sum{i}"),
        ]
        last = f"out{i}"
    nodes.append(helper.make_node("ReduceMax", [last], ["y"], axes=[1], keepdims=0, name="max"))
    return build(nodes, weights, {"y": 2}, {"x": ["batch", "rows", WIDTH]})


def node_of(model: Model, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def change_weight(model: Model, name: str, change: Callable[[Any], Any]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(values, np.float32), name))


def scaled(model: Model) -> str:
    change_weight(model, "w3", lambda w: w * 1.05)
    return "matmul3"


def one_weight(model: Model) -> str:
    def corrupt(weight: Any) -> Any:
        weight[3, 4] += 1
        return weight

    change_weight(model, "w1", corrupt)
    return "matmul1"


def epsilon(model: Model) -> str:
    node_of(model, "norm2").attribute[0].f = 0.1
    return "norm2"


def axis(model: Model) -> str:
    node_of(model, "soft4").attribute[0].i = 1
    return "soft4"


def permutation(model: Model) -> str:
    """The batch is moved; where it equals the rows, the graph still runs."""
    node_of(model, "turn1").attribute[0].ints[:] = [2, 0, 1]
    return "turn1"


def other_op(model: Model) -> str:
    node_of(model, "erf5").op_type = "Tanh"
    return "erf5"


def swapped_input(model: Model) -> str:
    node_of(model, "sum2").input[1] = "x"
    return "sum2"


FAULTS = [scaled, one_weight, epsilon, axis, permutation, other_op, swapped_input]


def feeds(seed: int = 0) -> dict[str, Any]:
    return {"x": np.random.default_rng(seed).standard_normal((WIDTH, WIDTH, WIDTH)).astype(np.float32)}


def find(folder: Path, candidate: Model, reference: Model, given: Any = None, **options: Any) -> Finding:
    onnx.save(candidate, str(folder / "a.onnx"))
    onnx.save(reference, str(folder / "b.onnx"))
    device, other = options.pop("devices", (ORT, ORT))
    return bisect_models(folder / "a.onnx", device, folder / "b.onnx", other, given or feeds(), **options)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("budget", [1 << 28, 40_000], ids=["at once", "in chunks"])
def test_planted_node_is_named(tmp_path: Path, fault: Callable[[Model], str], budget: int) -> None:
    wrong = deep_net()
    planted = fault(wrong)
    found = find(tmp_path, wrong, deep_net(), budget_bytes=budget)
    assert (found.kind, found.node) == ("node", planted), found.summary
    assert planted in found.summary
    assert found.nodes == 9 * LAYERS + 1
    alone = "replayed alone on the same inputs, it still differs"
    assert any(alone in c for c in found.causes) or found.causes[0] == "input 1 is 'x', in the reference it is 'out1'"
    assert all(t["status"] in ("agrees", "input") for t in found.inputs if not t.get("weight"))


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (scaled, "constant 'w3' (input 1) has other values"),
        (epsilon, "attribute epsilon is 0.1 instead of 1e-05"),
        (axis, "attribute axis is 1 instead of -1"),
        (other_op, "the operator is Tanh instead of Erf"),
    ],
)
def test_what_is_wrong_about_the_node_is_said(tmp_path: Path, fault: Callable[[Model], str], cause: str) -> None:
    wrong = deep_net()
    fault(wrong)
    assert any(cause in c for c in find(tmp_path, wrong, deep_net()).causes)


def test_memory_is_bounded_by_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run gives out more than the budget, or than one tensor."""
    from deploykit.benchmarks import bisect_probe

    given_out: list[int] = []
    run = bisect_probe.run_model

    def watched(*args: Any, **options: Any) -> Any:
        made = run(*args, **options)
        given_out.append(sum(a.nbytes for a in made.values()))
        return made

    monkeypatch.setattr(bisect_probe, "run_model", watched)
    wrong = deep_net()
    assert find(tmp_path, wrong, deep_net(), budget_bytes=50_000).kind != "node"  # nothing was planted
    other_op(wrong)
    given_out.clear()
    assert find(tmp_path, wrong, deep_net(), budget_bytes=50_000).node == "erf5"
    assert len(given_out) > 20
    assert max(given_out) <= 50_000


def test_error_that_passes_the_tolerance_later_is_traced_to_its_origin(tmp_path: Path) -> None:
    """A small error is inside the tolerance where it arises, and is multiplied afterwards."""
    nodes = [
        helper.make_node("Mul", ["x", "s"], ["a"], name="small fault"),
        helper.make_node("Sub", ["a", "offset"], ["b"], name="cancellation"),
        helper.make_node("Relu", ["b"], ["y"], name="relu"),
    ]

    def net(scale: float) -> Model:
        weights = {"s": np.float32(scale), "offset": np.float32(99.9)}
        return build(nodes, weights, {"y": 2}, {"x": [4, 8]})

    x = np.random.default_rng(0).uniform(99.95, 100.05, (4, 8)).astype(np.float32)
    found = find(tmp_path, net(1.00005), net(1.0), {"x": x})
    assert found.node == "small fault", found.summary
    assert any("the tolerance is passed later, at 'cancellation'" in n for n in found.notes)


def renamed(model: Model, prefix: str = "v") -> Model:
    """The same graph with other names for all tensors but inputs and outputs, as another exporter would give."""
    fixed = {v.name for v in (*model.graph.input, *model.graph.output)}
    names: dict[str, str] = {}
    for node in model.graph.node:
        for names_of in (node.input, node.output):
            for i, name in enumerate(names_of):
                if name and name not in fixed:
                    names_of[i] = names.setdefault(name, f"{prefix}{len(names)}")
        node.name = ""
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    return model


def test_a_small_column_beside_large_ones_is_traced(tmp_path: Path) -> None:
    """Large boxes and small scores in one output, which is within the tolerance of the whole."""

    def detector(activation: str) -> Model:
        rng = np.random.default_rng(0)
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["raw"], name="head"),
            helper.make_node("Mul", ["raw", "size"], ["boxes"], name="decode"),
            helper.make_node(activation, ["raw"], ["scores"], name="activation"),
            helper.make_node("Concat", ["boxes", "scores"], ["y"], name="join", axis=1),
        ]
        weights = {"w": rng.standard_normal((8, 4)).astype(np.float32), "size": np.float32(1e4)}
        return build(nodes, weights, {"y": 2}, {"x": ["batch", 8]})

    given = {"x": np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)}
    found = find(tmp_path, detector("HardSigmoid"), detector("Sigmoid"), given)
    assert (found.kind, found.node) == ("node", "activation")


@pytest.mark.parametrize("fault", [scaled, axis, other_op], ids=lambda f: f.__name__)
@pytest.mark.parametrize("budget", [1 << 28, 40_000], ids=["at once", "in chunks"])
def test_tensors_of_other_names_are_matched_by_value(
    tmp_path: Path, fault: Callable[[Model], str], budget: int
) -> None:
    wrong = deep_net()
    planted = fault(wrong)
    found = find(tmp_path, wrong, renamed(deep_net()), budget_bytes=budget)
    assert found.node == planted, found.summary


def test_names_that_mean_something_else_are_not_believed(tmp_path: Path) -> None:
    """Both graphs count their tensors; one has a node more at the start, so that every number is shifted."""
    wrong = deep_net()
    planted = scaled(wrong)
    operator = node_of(wrong, planted)
    makes = operator.output[0]
    shifted = deep_net()
    shifted.graph.node.insert(0, helper.make_node("Identity", ["x"], ["x2"]))
    shifted.graph.node[1].input[0] = "x2"
    order = [name for n in wrong.graph.node for name in n.output].index(makes)
    found = find(tmp_path, renamed(wrong), renamed(shifted))
    assert list(renamed(wrong).graph.node)[order].output[0] == found.node, found.summary


def conv_bn(*, fused: bool, scale: float = 1.0) -> Model:
    """Conv, BatchNormalization, Relu, Conv, GlobalAveragePool; or with the normalization folded into the first Conv."""
    rng = np.random.default_rng(2)
    w0, w1 = rng.standard_normal((8, 3, 3, 3)) / 5, rng.standard_normal((6, 8, 1, 1)) / 3 * scale
    gamma, beta, mean, var = (rng.uniform(0.5, 1.5, 8) for _ in range(4))
    factor = gamma / np.sqrt(var + 1e-5)
    weights = {"w1": w1}
    if fused:
        weights |= {"w0f": w0 * factor[:, None, None, None], "b0f": beta - mean * factor}
        nodes = [helper.make_node("Conv", ["x", "w0f", "b0f"], ["c0"], name="conv0", pads=[1] * 4)]
    else:
        weights |= {"w0": w0, "gamma": gamma, "beta": beta, "mean": mean, "var": var}
        nodes = [
            helper.make_node("Conv", ["x", "w0"], ["conv_raw"], name="conv0", pads=[1] * 4),
            helper.make_node("BatchNormalization", ["conv_raw", "gamma", "beta", "mean", "var"], ["n0"], name="bn0"),
        ]
    nodes += [
        helper.make_node("Relu", ["c0" if fused else "n0"], ["r0"], name="relu0"),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], name="conv1"),
        helper.make_node("GlobalAveragePool", ["c1"], ["y"], name="pool"),
    ]
    return build(nodes, {n: w.astype(np.float32) for n, w in weights.items()}, {"y": 4}, {"x": [2, 3, 8, 8]})


def test_fused_graph(tmp_path: Path) -> None:
    x = {"x": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    found = find(tmp_path, conv_bn(fused=True, scale=1.1), conv_bn(fused=False), x)
    assert found.node == "conv1", found.summary
    assert found.agreeing == ("r0",)
    folded = conv_bn(fused=True)
    change_weight(folded, "b0f", lambda b: b * 1.2)
    found = find(tmp_path, folded, conv_bn(fused=False), x)
    assert found.node == "conv0", found.summary
    assert "'r0', which follows from it, differs" in found.summary  # the convolution itself has no counterpart


def test_sizes_without_a_counterpart_are_not_blamed(tmp_path: Path) -> None:
    """One exporter fills a tensor of the input's size with zeros, the other knows the size."""

    def net(op: str, *, fills: bool) -> Model:
        zeros = [
            helper.make_node("Shape", ["x"], ["size"], name="size"),
            helper.make_node("Expand", ["zero", "size"], ["zeros"], name="fill"),
        ]
        nodes = [
            *(zeros if fills else []),
            helper.make_node("Mul", ["x", "w"], [f"m{fills}"], name="scale"),
            helper.make_node(op, [f"m{fills}"], [f"a{fills}"], name="squash"),
            helper.make_node("Add", [f"a{fills}", "zeros" if fills else "zero"], ["y"], name="end"),
        ]
        return build(nodes, {"zero": np.float32(0), "w": np.float32(2)}, {"y": 2}, {"x": [4, 8]})

    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    found = find(tmp_path, net("Sigmoid", fills=True), net("Tanh", fills=False), {"x": x})
    assert found.node == "squash", found.summary


def test_external_data(tmp_path: Path) -> None:
    wrong, right = deep_net(), deep_net()
    planted = scaled(wrong)
    for name, model in (("a", wrong), ("b", right)):
        (tmp_path / name).mkdir()
        onnx.save(
            model, str(tmp_path / name / "m.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0
        )
    found = bisect_models(tmp_path / "a" / "m.onnx", ORT, tmp_path / "b" / "m.onnx", ORT, feeds())
    assert found.node == planted
    out = save_finding(found, tmp_path / "report", {})
    assert not (out / "node.onnx.data").exists()
    assert numpy_helper.to_array(read_model(out / "node.onnx").graph.initializer[0]).shape == (WIDTH, WIDTH)


def branches(factor: float, flag: bool) -> Model:
    def branch(name: str, scale: float) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Tanh", ["h"], [f"{name}_t"], name=f"{name}_tanh"),
            helper.make_node("Mul", [f"{name}_t", f"{name}_s"], [f"{name}_m"], name=f"{name}_mul"),
            helper.make_node("Sin", [f"{name}_m"], [f"{name}_o"], name=f"{name}_sin"),
        ]
        made = helper.make_tensor_value_info(f"{name}_o", TensorProto.FLOAT, [4, 8])
        return helper.make_graph(nodes, name, [], [made], [numpy_helper.from_array(np.float32(scale), f"{name}_s")])

    nodes = [
        helper.make_node("Exp", ["x"], ["h"], name="exp"),
        helper.make_node("ReduceSum", ["h"], ["total"], keepdims=0, name="sum"),
        helper.make_node("Greater", ["total", "low" if flag else "high"], ["cond"], name="compare"),
        helper.make_node(
            "If", ["cond"], ["z"], name="either",
            then_branch=branch("then", factor if flag else 2.0), else_branch=branch("else", 2.0 if flag else factor),
        ),
        helper.make_node("Add", ["z", "x"], ["y"], name="end"),
    ]  # fmt: skip
    return build(nodes, {"low": np.float32(0), "high": np.float32(1e9)}, {"y": 2}, {"x": [4, 8]})


@pytest.mark.parametrize("flag", [True, False])
def test_inside_the_branch_of_an_if(tmp_path: Path, flag: bool) -> None:
    x = {"x": np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)}
    found = find(tmp_path, branches(1.5, flag), branches(2.0, flag), x)
    assert found.node == ("then_mul" if flag else "else_mul"), found.summary
    assert found.path == ("If either",)
    assert found.nodes == 5


def loop(factor: float, trips: int = 4) -> Model:
    """y = y * w + x, a few times; one element of w is wrong and meets zeros in the first iteration."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 8)).astype(np.float32) / 3
    weight[0] *= factor
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["cond_in"], ["cond_out"], name="go on"),
            helper.make_node("MatMul", ["state", "w"], ["moved"], name="inner_matmul"),
            helper.make_node("Add", ["moved", "h"], ["next"], name="inner_add"),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("cond_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [4, 8]),
        ],
        [
            helper.make_tensor_value_info("cond_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [4, 8]),
        ],
    )
    nodes = [
        helper.make_node("Tanh", ["x"], ["h"], name="tanh"),
        helper.make_node("Loop", ["trips", "", "start"], ["z"], name="repeat", body=body),
        helper.make_node("Relu", ["z"], ["y"], name="relu"),
    ]
    weights = {"trips": np.array(trips), "start": np.zeros((4, 8), np.float32), "w": weight}
    return build(nodes, weights, {"y": 2}, {"x": [4, 8]})


def test_inside_the_body_of_a_loop(tmp_path: Path) -> None:
    x = {"x": np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)}
    found = find(tmp_path, loop(1.5), loop(1.0), x)
    assert found.node == "inner_matmul", found.summary
    assert found.path == ("Loop repeat",)
    assert "in iteration 1 of the loop" in found.notes  # in iteration 0 the state is zero


def test_nan_is_traced(tmp_path: Path) -> None:
    def net(op: str) -> Model:
        nodes = [
            helper.make_node("Sub", ["x", "one"], ["a"], name="shift"),
            helper.make_node(op, ["a"], ["b"], name="root"),
            helper.make_node("Mul", ["b", "one"], ["y"], name="scale"),
        ]
        return build(nodes, {"one": np.float32(1)}, {"y": 2}, {"x": [4, 8]})

    x = np.full((4, 8), 5.0, np.float32)
    x[2, 3] = 0.5
    found = find(tmp_path, net("Sqrt"), net("Relu"), {"x": x})
    assert found.node == "root"
    right = build(
        [
            helper.make_node("Sub", ["x", "one"], ["a"]),
            helper.make_node("Abs", ["a"], ["p"]),
            helper.make_node("Sqrt", ["p"], ["b"]),
            helper.make_node("Mul", ["b", "one"], ["y"]),
        ],
        {"one": np.float32(1)}, {"y": 2}, {"x": [4, 8]},
    )  # fmt: skip
    found = find(tmp_path, net("Sqrt"), right, {"x": x})
    assert found.node == "root"
    assert "NaN on one side only at 1 of 32 places, first at [2, 3]" in found.summary


def quantized(model: Model, *, clipped: str = "") -> Model:
    """8-bit Q/DQ pairs behind every MatMul; the one of ``clipped`` has a scale that is far too small."""
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "MatMul":
            continue
        name = node.output[0]
        scale = 0.001 if name == clipped else 0.03
        model.graph.initializer.append(numpy_helper.from_array(np.float32(scale), f"{name}_scale"))
        model.graph.initializer.append(numpy_helper.from_array(np.int8(0), f"{name}_zero"))
        ends = [f"{name}_scale", f"{name}_zero"]
        nodes += [
            helper.make_node("QuantizeLinear", [name, *ends], [f"{name}_q"], name=f"{name}_quantize"),
            helper.make_node("DequantizeLinear", [f"{name}_q", *ends], [f"{name}_dq"], name=f"{name}_dequantize"),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for node in model.graph.node:
        if node.op_type == "Add" and f"{node.input[0]}_q" in {n for m in nodes for n in m.output}:
            node.input[0] += "_dq"
    return model


def test_quantized_against_float(tmp_path: Path) -> None:
    found = find(tmp_path, quantized(deep_net(), clipped="mm3"), deep_net(), max_error=0.05)
    assert found.node == "mm3_quantize", found.summary
    assert "values differ" in found.summary or "of the output's norm" in found.summary
    rows = {r["node"]: r for r in found.layers}
    assert rows["mm3_dequantize"]["sqnr_db"] < 10 < rows["mm3_dequantize"]["input_sqnr_db"]
    assert [r["sqnr_db"] for r in found.layers] == sorted(r["sqnr_db"] for r in found.layers)
    fine = find(tmp_path, quantized(deep_net()), deep_net(), max_error=0.05)
    assert any("the strict tolerance was taken" in n for n in fine.notes)


def test_two_runtimes_on_one_file(tmp_path: Path) -> None:
    """OpenVINO's CPU computes int64 in 32 bits: the node that makes the large number is found."""
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64, name="to int"),
        helper.make_node("Mul", ["i", "large"], ["big"], name="overflow"),
        helper.make_node("Cast", ["big"], ["f"], to=TensorProto.FLOAT, name="to float"),
        helper.make_node("Mul", ["f", "tiny"], ["y"], name="scale"),
    ]
    weights = {"large": np.array(5_000_000), "tiny": np.float32(1e-9)}
    model = build(nodes, weights, {"y": 2}, {"x": [4, 8]})
    x = np.random.default_rng(0).uniform(500, 2000, (4, 8)).astype(np.float32)
    onnx.save(model, str(tmp_path / "m.onnx"))
    found = bisect_models(tmp_path / "m.onnx", OPENVINO, tmp_path / "m.onnx", ORT, {"x": x})
    assert found.node == "overflow", found.summary


def test_fault_of_the_optimizer_is_not_laid_on_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs agree as they stand; a stand-in for a faulty fusion changes one of them from a level on."""
    real = bisection.open_session

    def faulty(path: Any, device: Any, *, optimize: Any = True) -> Any:
        session = real(path, device, optimize=optimize)
        if optimize in ("extended", "all") and path.name == "a.onnx":
            run = session.run
            session.run = lambda given: {n: a * 1.01 for n, a in run(given).items()}
        return session

    monkeypatch.setattr(bisection, "open_session", faulty)
    found = find(tmp_path, deep_net(), deep_net())
    assert found.kind == "optimizer"
    assert "from level 'extended' on" in found.summary and "a.onnx" in found.summary
    monkeypatch.setattr(bisection, "open_session", real)
    assert find(tmp_path, deep_net(), deep_net()).kind == "unknown"


def test_report_can_be_replayed(tmp_path: Path) -> None:
    wrong = deep_net()
    planted = axis(wrong)
    found = find(tmp_path, wrong, deep_net())
    out = save_finding(found, tmp_path / "deep" / "report", {"candidate": "a.onnx", "device": "ort:cpu"})
    assert not list(out.parent.glob(".*"))
    report = json.loads((out / "report.json").read_text())
    assert (report["node"], report["device"]) == (planted, "ort:cpu")
    readme = (out / "README.md").read_text()
    assert planted in readme and "replay.py" in readme
    done = subprocess.run([sys.executable, str(out / "replay.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "soft4: max abs 0 from candidate.npz"
    assert float(lines[1].split()[3]) > 0.01 and "reference.npz" in lines[1]
    assert read_model(out / "reference_node.onnx").graph.node[0].attribute[0].i == -1
    with pytest.raises(OutputExistsError):
        save_finding(found, out, {})
    assert json.loads((out / "report.json").read_text()) == report


def test_half_precision_candidate(tmp_path: Path) -> None:
    """fp16 rounds everywhere; only what is beyond its tolerance is a finding."""
    x = feeds()

    def half(model: Model) -> Model:
        for tensor in model.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
        model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.FLOAT16, name="down"))
        for node in list(model.graph.node)[1:]:
            node.input[:] = ["x16" if n == "x" else n for n in node.input]
            node.output[:] = ["y16" if n == "y" else n for n in node.output]
        model.graph.node.append(helper.make_node("Cast", ["y16"], ["y"], to=TensorProto.FLOAT, name="up"))
        return model

    wrong = deep_net()
    other_op(wrong)
    found = find(tmp_path, half(wrong), deep_net(), x)
    assert found.node == "erf5", found.summary
