"""Shapes at given sizes: right wherever they are claimed to be known, through control flow and chains of Shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploykit.costs import count_compute
from deploykit.shaping import Trace, size_of, trace_model

F32 = np.float32


def trace(model: onnx.ModelProto, **sizes: int) -> Trace:
    return trace_model(model, Path("m.onnx"), sizes)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_known_shapes_are_right_over_the_standards_own_cases(tmp_path: Path) -> None:
    """Every third node case of the onnx package: what is claimed to be known is what it expects; nothing raises."""
    from onnx.backend.test.loader import load_node_model_tests

    right, unknown, wrong = 0, 0, []
    for case in load_node_model_tests()[::3]:
        if case.model is None:
            continue
        found = trace_model(case.model, tmp_path / "m.onnx", {})
        for output, expected in zip(case.model.graph.output, case.data_sets[0][1], strict=False):
            shape = tuple(expected.dims) if isinstance(expected, onnx.TensorProto) else getattr(expected, "shape", None)
            value = found.values.get(output.name)
            if shape is None or value is None or value.size is None:
                unknown += 1
            elif value.shape == shape:
                right += 1
            else:
                wrong.append((case.name, value.shape, shape))
    assert wrong == []
    # Sizes that come in as data at run time cannot be known.
    assert right > 4 * unknown


def test_a_chain_of_shape_gather_concat_reshape_has_an_end(build: Any) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="product"),
    ]
    weights = {"zero": np.int64(0), "axes": np.array([0]), "rest": np.array([-1, 4]), "w": np.ones((4, 2), F32)}
    found = trace(build(nodes, {"x": ["batch", 6, 8]}, {"y": None}, weights), batch=3)
    assert found.values["r"].shape == (3, 12, 4)
    assert count_compute(found).macs == 3 * 12 * 4 * 2


def test_wrong_declared_shapes_and_stale_value_infos_do_not_count(build: Any) -> None:
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [2, 4]}, {"y": [9, 9]}, {"w": np.ones((4, 3), F32)}
    )
    model.graph.value_info.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [7, 7, 7]))
    assert trace(model).values["y"].shape == (2, 3)


def test_an_unknown_rank_stays_unknown(build: Any) -> None:
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], {"x": None}, {"y": None}, {"w": np.ones((4, 3), F32)}
    )
    found = trace(model)
    assert found.values["y"].size is None
    assert [u["node"] for u in count_compute(found).uncounted] == ["'m'"]


def test_a_contradiction_is_a_finding(build: Any) -> None:
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")],
        {"x": [2, 5]},
        {"y": None},
        {"w": np.ones((4, 3), F32)},
    )
    found = trace(model)
    assert list(found.failures) == ["'m'"]
    assert "Incompatible dimensions" in found.failures["'m'"]


def branch(name: str, width: int) -> onnx.GraphProto:
    return helper.make_graph(
        [helper.make_node("MatMul", ["x", f"w{width}"], [name], name=f"m{width}")], name, [],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
    )  # fmt: skip


@pytest.mark.parametrize(("condition", "macs"), [(True, 2 * 4 * 3), (False, 2 * 4 * 5)])
def test_of_an_if_with_a_known_condition_one_branch_counts(build: Any, condition: bool, macs: int) -> None:
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branch("t", 3), else_branch=branch("e", 5))]
    weights = {"c": np.array(condition), "w3": np.ones((4, 3), F32), "w5": np.ones((4, 5), F32)}
    found = count_compute(trace(build(nodes, {"x": [2, 4]}, {"y": None}, weights)))
    assert (found.macs, found.notes) == (macs, [])


def test_of_an_if_that_depends_on_data_the_dearer_branch_counts_and_that_is_said(build: Any) -> None:
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch("t", 3), else_branch=branch("e", 5)),
    ]
    weights = {"w3": np.ones((4, 3), F32), "w5": np.ones((4, 5), F32)}
    found = trace(build(nodes, {"x": [2, 4]}, {"y": None}, weights))
    compute = count_compute(found)
    assert compute.macs == 2 * 4 * 5
    assert "else_branch, the dearer" in compute.notes[0]
    assert found.values["y"].shape == (2, None)


@pytest.mark.parametrize("early", [False, True])
def test_a_loop_counts_as_often_as_it_runs_where_that_is_known(build: Any, early: bool) -> None:
    body_nodes = [helper.make_node("MatMul", ["h", "w"], ["h2"], name="step")]
    if early:
        body_nodes += [
            helper.make_node("ReduceSum", ["h2"], ["sum"], keepdims=0),
            helper.make_node("Cast", ["sum"], ["go2"], to=TensorProto.BOOL),
        ]
    else:
        body_nodes.append(helper.make_node("Identity", ["go"], ["go2"]))
    body = helper.make_graph(
        body_nodes, "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go2", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h2", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("h2", TensorProto.FLOAT, None),
        ],
    )  # fmt: skip
    nodes = [helper.make_node("Loop", ["trips", "yes", "x"], ["last", "all"], name="loop", body=body)]
    weights = {"trips": np.int64(6), "yes": np.array(True), "w": np.ones((4, 4), F32)}
    found = trace(build(nodes, {"x": [2, 4]}, {"last": None, "all": None}, weights))
    compute = count_compute(found)
    assert compute.macs == (1 if early else 6) * 2 * 4 * 4
    assert found.values["last"].shape == (2, 4)
    assert found.values["all"].shape == (None if early else 6, 2, 4)
    assert len(compute.notes) == early


def test_a_scan_counts_once_for_each_slice(build: Any) -> None:
    body = helper.make_graph(
        [helper.make_node("MatMul", ["piece", "w"], ["made"]), helper.make_node("Add", ["state", "made"], ["state2"])],
        "body",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("state", "piece")],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("state2", "made")],
    )
    nodes = [helper.make_node("Scan", ["x0", "xs"], ["end", "all"], body=body, num_scan_inputs=1)]
    model = build(nodes, {"x0": [2, 3], "xs": ["steps", 2, 4]}, {"end": None, "all": None}, {"w": np.ones((4, 3), F32)})
    found = trace(model, steps=5)
    assert found.values["end"].shape == (2, 3)
    assert found.values["all"].shape == (5, 2, 3)
    assert count_compute(found).macs == 5 * 2 * 4 * 3


def test_functions_of_the_model_are_followed(build: Any) -> None:
    opsets = [helper.make_opsetid("", 18)]
    function = helper.make_function(
        "own", "Dense", ["a", "b"], ["c"], [helper.make_node("MatMul", ["a", "b"], ["c"])], opsets
    )
    nodes = [
        helper.make_node("Dense", ["x", "w"], ["h"], domain="own"),
        helper.make_node("Dense", ["h", "w"], ["y"], domain="own"),
    ]
    model = build(
        nodes, {"x": [2, 4]}, {"y": None}, {"w": np.ones((4, 4), F32)}, domains={"own": 1}, functions=[function]
    )
    assert count_compute(trace(model)).macs == 2 * (2 * 4 * 4)


def test_small_external_tensors_are_read_and_large_ones_are_not(build: Any, tmp_path: Path) -> None:
    model = build([helper.make_node("Reshape", ["w", "to"], ["y"])], {"x": [1]}, {"y": None},
                  {"w": np.ones(2048, F32), "to": np.array([64, 32])})  # fmt: skip
    path = tmp_path / "m.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="m.data", size_threshold=0)
    found = trace_model(onnx.load(str(path), load_external_data=False), path, {})
    assert found.values["y"].shape == (64, 32)
    assert found.values["w"].data is None


def test_sums_of_dimensions() -> None:
    sizes = {"past": 7, "sequence": 3}
    assert size_of("past + sequence", sizes) == 10
    assert size_of("past+1", sizes) == 8
    assert size_of("past + other", sizes) is None
    assert size_of("other", sizes) is None
