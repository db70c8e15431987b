"""Rewrites before static quantization: the same function, in the form that runtimes run fast."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.optimizers.editor import GraphEditor
from deploykit.optimizers.prepare import infer_shapes
from deploykit.optimizers.rewrite import rewrite
from deploykit.optimizers.shape_terms import Dim, shape_terms

RNG = np.random.default_rng(0)
BATCH, STEPS, HEADS, WIDTH = 2, 5, 2, 4
LAST = np.iinfo(np.int64).max


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def build(nodes, weights, inputs, outputs, opset=18):
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return infer_shapes(model)


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs.split(), [output], name=f"node_{output}", **attributes)


def attention(opset=18, hidden=-np.inf, guard=True, all_seen=False):
    """Attention with a mask as torch.export writes it: keys turned by way of Reshapes, a guard behind the softmax."""
    size = HEADS * WIDTH
    weights = {
        **{f"w{k}": normal(size, size) for k in "qkv"}, **{f"b{k}": normal(size) for k in "qk"},
        "split": np.array([0, 0, HEADS, WIDTH]), "merge": np.array([0, 0, size]), "factor": np.float32(0.5),
        "minus1": np.array([-1]), "minus2": np.array([-2]), "last": np.array([LAST]), "first": np.array([-LAST - 1]),
        "zero": np.float32(0), "hidden": np.float32(hidden), "axes": np.array([1, 2]),
        "seen": np.ones((1, 1, 1, 1), bool), "ones": np.array([1, 1, 1]),
    }  # fmt: skip
    reduce = {} if opset >= 13 else {"axes": [1, 2]}
    nodes = [
        node("MatMul", "x wq", "q0"), node("Add", "q0 bq", "q1"), node("Reshape", "q1 split", "q2"),
        node("Transpose", "q2", "q3", perm=[0, 2, 1, 3]), node("Mul", "q3 factor", "q"),
        node("MatMul", "x wk", "k0"), node("Add", "k0 bk", "k1"), node("Reshape", "k1 split", "k2"),
        node("Transpose", "k2", "k3", perm=[0, 2, 1, 3]),
        node("MatMul", "x wv", "v0"), node("Reshape", "v0 split", "v2"),
        node("Transpose", "v2", "v", perm=[0, 2, 1, 3]),
        node("Shape", "k3", "s"), node("Slice", "s minus1 last", "columns"), node("Slice", "s minus2 minus1", "rows"),
        node("Slice", "s first minus2", "outer"),
        node("Concat", "minus1 rows columns", "flat", axis=0), node("Concat", "outer columns rows", "back", axis=0),
        node("Reshape", "k3 flat", "k4"), node("Transpose", "k4", "k5", perm=[0, 2, 1]),
        node("Reshape", "k5 back", "k6"),
        node("Mul", "k6 factor", "k"),
        node("MatMul", "q k", "scores"),
        node("Unsqueeze", "visible axes" if opset >= 13 else "visible", "visible4", **reduce),
        node("Shape", "x", "shape"), node("Slice", "shape zero64 one64", "batch"),
        node("Concat", "batch ones", "grown", axis=0),
        node("Expand", "seen grown", "every"),
        node("Where", f"{'every' if all_seen else 'visible4'} zero hidden", "mask"),
        node("Add", "scores mask", "masked"), node("Softmax", "masked", "p", axis=-1),
        *([node("IsNaN", "p", "nan"), node("Where", "nan zero p", "safe")] if guard else []),
        node("MatMul", "safe v" if guard else "p v", "o"), node("Transpose", "o", "o1", perm=[0, 2, 1, 3]),
        node("Reshape", "o1 merge", "y"),
    ]  # fmt: skip
    weights |= {"zero64": np.array([0]), "one64": np.array([1])}
    inputs = {
        "x": (TensorProto.FLOAT, ["batch", "steps", size]),
        "visible": (TensorProto.BOOL, ["batch", "steps"]),
    }
    return build(nodes, weights, inputs, ["y"], opset)


def feeds(hidden_rows=False):
    visible = np.arange(STEPS)[None] < np.array([[STEPS], [2]])
    if hidden_rows:
        visible[1] = False
    return {"x": normal(BATCH, STEPS, HEADS * WIDTH), "visible": visible}


def run(model, given, level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL):
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: given[i.name] for i in session.get_inputs()})


def rewritten(model):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    notes = rewrite(copy) + rewrite(copy, last=True)
    onnx.checker.check_model(copy, full_check=True)
    return copy, notes


def kinds(model):
    return Counter(n.op_type for n in model.graph.node)


def same(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("opset", [13, 18, 21])
@pytest.mark.parametrize("hidden", [-np.inf, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("hidden_rows", [False, True])
def test_attention_keeps_its_numbers(opset, hidden, hidden_rows):
    model = attention(opset, hidden)
    made, notes = rewritten(model)
    given = feeds(hidden_rows)
    same(run(model, given), run(made, given))
    same(run(model, given), run(made, given, ort.GraphOptimizationLevel.ORT_ENABLE_ALL))
    found = kinds(made)
    assert found["Slice"] == 0 and found["Mul"] == 0 and found["Max"] == 1, found
    assert len(notes) == 4, notes


def test_rows_that_a_mask_hides_stay_zero():
    model = attention()
    given = feeds(hidden_rows=True)
    (wanted,), (found,) = run(model, given), run(rewritten(model)[0], given)
    assert not wanted[1].any() and not found[1].any()
    assert found[0].any()


def test_the_guard_reads_the_smaller_tensor():
    made = rewritten(attention())[0]
    (guard,) = [n for n in made.graph.node if n.op_type == "IsNaN"]
    makers = {o: n.op_type for n in made.graph.node for o in n.output}
    assert makers[guard.input[0]] == "MatMul"


def test_masked_scores_are_no_denormal_numbers():
    model = attention(guard=False, hidden=-1e5)
    made, _ = rewritten(model)
    for proto in (model, made):
        soft = next(n for n in proto.graph.node if n.op_type == "Softmax")
        proto.graph.output.append(helper.make_tensor_value_info(soft.output[0], TensorProto.FLOAT, None))
    given = feeds()
    (_, before), (_, after) = run(model, given), run(made, given)
    assert (before < np.finfo(np.float32).tiny).any(), "the mask does not reach what is to be avoided"
    assert (after >= np.finfo(np.float32).tiny).all() and after.min() < 1e-30


def test_masks_that_hide_nothing_go_with_their_guards():
    model = attention(all_seen=True)
    made, notes = rewritten(model)
    given = feeds()
    same(run(model, given), run(made, given))
    assert not {"Where", "IsNaN", "Expand", "Max"} & set(kinds(made)), kinds(made)
    assert any("hide nothing" in note for note in notes)


def test_scores_without_a_large_mask_are_left_alone():
    assert "Max" not in kinds(rewritten(attention(hidden=-5.0))[0])


def test_a_softmax_that_is_an_output_keeps_its_guard_in_front():
    model = attention()
    model.graph.output.append(helper.make_tensor_value_info("safe", TensorProto.FLOAT, ["b", HEADS, "s", "t"]))
    made, _ = rewritten(model)
    given = feeds(hidden_rows=True)
    same(run(model, given), run(made, given))


def test_keys_turned_by_another_shape_are_left_alone():
    model = attention()
    back = next(n for n in model.graph.node if n.output[0] == "back")
    back.input[:] = ["outer", "rows", "columns"]  # what follows multiplies rows, not columns: only the shape differs
    made = GraphEditor(model)
    from deploykit.optimizers.rewrite_attention import turn_keys_once

    assert turn_keys_once(made) == 0


def gelu(root=2**0.5, half_first=True):
    nodes = [
        node("Div", "x root", "d"), node("Erf", "d", "e"), node("Add", "e one", "p"),
        *([node("Mul", "half p", "h"), node("Mul", "x h", "y")] if half_first else
          [node("Mul", "x p", "h"), node("Mul", "h half", "y")]),
    ]  # fmt: skip
    weights = {"root": np.float32(root), "one": np.float32(1), "half": np.float32(0.5)}
    return build([*nodes, node("Neg", "y", "z")], weights, {"x": (TensorProto.FLOAT, ["batch", 8])}, ["z"])


def optimized_kinds(model, tmp_path):
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return kinds(onnx.load(tmp_path / "optimized.onnx"))


def test_gelu_is_fused_by_onnxruntime_and_equal_bit_for_bit(tmp_path):
    model = gelu()
    made, _ = rewritten(model)
    given = {"x": normal(7, 8)}
    np.testing.assert_array_equal(run(model, given)[0], run(made, given)[0])
    assert optimized_kinds(model, tmp_path)["Gelu"] == 0
    assert optimized_kinds(made, tmp_path)["Gelu"] == 1


@pytest.mark.parametrize("model", [gelu(root=1.5), gelu(half_first=False)], ids=["other function", "in order"])
def test_what_is_no_gelu_or_is_in_order_is_left_alone(model):
    made, notes = rewritten(model)
    assert not notes and kinds(made) == kinds(model)


def residual(bias=True):
    size = 8
    nodes = [
        node("MatMul", "x w", "m"), *([node("Add", "m b", "mb")] if bias else []),
        node("Add", "mb x" if bias else "m x", "r"), node("LayerNormalization", "r g beta", "n", axis=-1),
        node("Neg", "n", "y"),
    ]  # fmt: skip
    weights = {"w": normal(size, size), "b": normal(size), "g": normal(size), "beta": normal(size)}
    return build(nodes, weights, {"x": (TensorProto.FLOAT, ["batch", "steps", size])}, ["y"])


@pytest.mark.parametrize("bias", [True, False])
def test_residual_sums_keep_onnxruntime_from_its_slow_fusion(bias, tmp_path):
    model = residual(bias)
    made, _ = rewritten(model)
    given = {"x": normal(2, 3, 8)}
    same(run(model, given), run(made, given))
    assert optimized_kinds(model, tmp_path)["SkipLayerNormalization"] == 1, "nothing to keep it from any more"
    assert optimized_kinds(made, tmp_path)["SkipLayerNormalization"] == 0


def test_scales_are_not_folded_into_weights_that_others_use():
    nodes = [
        node("MatMul", "x w", "m"),
        node("Mul", "m half", "a"),
        node("MatMul", "x w", "n"),
        node("Add", "a n", "y"),
    ]
    model = build(nodes, {"w": normal(8, 8), "half": np.float32(0.25)}, {"x": (TensorProto.FLOAT, ["batch", 8])}, ["y"])
    made, _ = rewritten(model)
    given = {"x": normal(3, 8)}
    same(run(model, given), run(made, given))


def test_a_scale_of_a_tensor_with_two_readers_stays():
    nodes = [node("MatMul", "x w", "m"), node("Mul", "m half", "a"), node("Add", "a m", "y")]
    model = build(nodes, {"w": normal(8, 8), "half": np.float32(0.25)}, {"x": (TensorProto.FLOAT, ["batch", 8])}, ["y"])
    assert kinds(rewritten(model)[0]) == kinds(model)


def test_shape_terms_tell_constants_from_sizes():
    graph = GraphEditor(attention())
    assert shape_terms(graph, "back") == [Dim("k3", 0), HEADS, WIDTH, Dim("k3", 2)]
    assert shape_terms(graph, "flat") == [-1, Dim("k3", 2), WIDTH]
    assert shape_terms(graph, "x") is None


def test_what_a_branch_reads_stays():
    inner = helper.make_graph(
        [node("Identity", "p", "inner")], "then", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [node("Identity", "x", "outer")], "else", [], [helper.make_tensor_value_info("outer", TensorProto.FLOAT, None)]
    )
    model = gelu()
    made = build(
        [*list(model.graph.node)[:-1], node("If", "c", "z", then_branch=inner, else_branch=other)],
        {w.name: numpy_helper.to_array(w) for w in model.graph.initializer},
        {"x": (TensorProto.FLOAT, ["batch", 8]), "c": (TensorProto.BOOL, [])},
        ["y", "z"],
    )
    given = {"x": normal(3, 8), "c": np.array(True)}
    after, _ = rewritten(made)
    for wanted, found in zip(run(made, given), run(after, given), strict=True):
        np.testing.assert_array_equal(wanted, found)
