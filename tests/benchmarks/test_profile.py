"""Kernels led back to the nodes of the file."""

from __future__ import annotations

from typing import Any

import pytest

from deploykit.benchmarks.profile import Kernel, Profile, SourceNode, fold, join
from deploykit.runtimes.placement import ExecutedNode, NodePlacement


def node(name: str, op: str, inputs: str, outputs: str, **more: Any) -> SourceNode:
    return SourceNode(name, op, tuple(inputs.split()), tuple(outputs.split()), **more)


def placed(name: str, op: str, us: float) -> NodePlacement:
    return NodePlacement(name, op, "CPU", "float32", us, 100)


def kernel(name: str, op: str, us: float, *sources: str, precision: str = "float32") -> Kernel:
    return Kernel(name, op, "CPU", precision, us, 100, sources=frozenset(sources))


CHAIN = [
    node("conv", "Conv", "x w", "c", macs=100, weights=frozenset({"w"}), compute=True),
    node("relu", "Relu", "c", "r"),
    node("next", "Conv", "r v", "d", macs=50, weights=frozenset({"v"}), compute=True),
    node("end", "Relu", "d", "y"),
]


def test_a_kernel_named_after_the_last_tensor_belongs_to_the_product_that_was_fused_into_it() -> None:
    kernels, layers = fold([kernel("r_nchwc", "Conv", 8, "r"), kernel("y_nchwc", "Conv", 2, "y")], CHAIN)
    assert [[n.name for n in k.nodes] for k in kernels] == [["conv", "relu"], ["next", "end"]]
    assert [(n.name, n.op, n.macs, n.time_us, n.own) for n in layers] == [
        ("conv", "Conv", 100, 8, True),
        ("next", "Conv", 50, 2, True),
    ]


def test_a_kernel_is_known_by_the_weight_that_nothing_else_reads() -> None:
    kernels, _ = fold([kernel("fused_1", "Conv", 1, "w"), kernel("fused_2", "Conv", 1, "v")], CHAIN)
    assert [k.label for k in kernels] == ["conv", "next"]


def test_a_shared_weight_tells_nothing() -> None:
    shared = [node(n, "MatMul", f"{n}_in w", f"{n}_out", weights=frozenset({"w"}), compute=True) for n in ("a", "b")]
    kernels, _ = fold([kernel("fused", "MatMul", 1, "w")], shared)
    assert kernels[0].main is None
    assert kernels[0].label == "fused"


def test_kernels_that_the_runtime_added_are_not_attributed() -> None:
    kernels, layers = fold([kernel("conv", "Conv", 8), kernel("Reorder", "ReorderInput", 3, "reorder")], CHAIN[:2])
    profile = Profile("ort:cpu", "CPU", tuple(kernels), tuple(layers), 12.0)
    assert (profile.profiled_us, profile.unattributed_us) == (11, 3)
    assert [n.own for n in layers] == [True, False]


def test_a_reorder_behind_a_layer_adds_its_time_and_not_the_macs_once_more() -> None:
    _, layers = fold([kernel("conv", "Conv", 8, "w"), kernel("ReorderOutput", "ReorderOutput", 3, "c")], CHAIN[:1])
    assert [(n.name, n.time_us, n.macs, len(n.kernels), n.moved_bytes) for n in layers] == [("conv", 11, 100, 2, 200)]
    assert layers[0].kernels[0].op == "Conv"


def test_a_product_never_goes_to_a_kernel_that_does_not_compute() -> None:
    kernels, _ = fold([kernel("relu", "Relu", 1)], CHAIN[:2])
    assert [n.name for n in kernels[0].nodes] == ["relu"]


def test_one_kernel_of_several_products_counts_all_of_them_and_is_named_after_the_dearest() -> None:
    merged = [
        node("q", "MatMul", "x wq", "a", macs=10, weights=frozenset({"wq"}), compute=True),
        node("k", "MatMul", "x wk", "b", macs=30, weights=frozenset({"wk"}), compute=True),
        node("score", "MatMul", "a b", "y", macs=5, compute=True),
    ]
    _, layers = fold([kernel("attention", "Attention", 9, "y")], merged)
    assert [(n.name, n.macs) for n in layers] == [("k", 45)]


def test_bytes_come_from_the_file_where_the_runtime_does_not_tell() -> None:
    bare = Kernel("conv", "Conv", "CPU", "float32", 1.0)
    _, layers = fold([bare], [node("conv", "Conv", "x w", "c", moved_bytes=640, compute=True)])
    assert layers[0].moved_bytes == 640


def test_nameless_nodes_are_paired_by_their_order() -> None:
    executed = [
        ExecutedNode("", "Gemm", "float32", frozenset({"y1"})),
        ExecutedNode("", "Relu", "", frozenset({"r"})),
        ExecutedNode("", "Gemm", "float32", frozenset({"y2"})),
    ]
    found = join([placed("Gemm_6", "Gemm", 1), placed("Relu_3", "Relu", 1), placed("Gemm_2", "Gemm", 1)], executed)
    assert [k.sources for k in found] == [{"y1"}, {"r"}, {"y2"}]


def test_nameless_nodes_of_unequal_number_stay_unknown() -> None:
    executed = [ExecutedNode("", "Gemm", "float32", frozenset({"y1"}))]
    found = join([placed("Gemm_6", "Gemm", 1), placed("Gemm_2", "Gemm", 1)], executed)
    assert [k.sources for k in found] == [frozenset(), frozenset()]


@pytest.mark.parametrize(("loop", "left"), [(50.0, 10.0), (30.0, 0.0)])
def test_the_time_of_a_body_is_not_counted_twice(loop: float, left: float) -> None:
    executed = [ExecutedNode("loop", "Loop", "", frozenset({"loop"}))]
    found = join([placed("loop", "Loop", loop), placed("inner", "MatMul", 40)], executed)
    assert [k.time_us for k in found] == [pytest.approx(left), 40]


def test_weights_that_the_runtime_packed_away_are_read_all_the_same() -> None:
    stored = node("p", "MatMul", "x w", "y", weights=frozenset({"w"}), weight_bytes=512, compute=True)
    packed = Kernel("p", "MatMul", "CPU", "float32", 1.0, 384)
    listed = Kernel("p", "MatMul", "CPU", "float32", 1.0, 896, 512)
    assert [fold([k], [stored])[1][0].moved_bytes for k in (packed, listed)] == [896, 896]
