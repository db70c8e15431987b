"""Every fault has its rule, and what costs nothing is not a fault."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deploykit.benchmarks.explain import explanation_markdown, explanation_text
from deploykit.benchmarks.findings import Context, Finding, in_order, rows, whole
from deploykit.benchmarks.profile import Kernel, Profile, SourceNode, fold
from deploykit.benchmarks.roofline import Peaks
from deploykit.benchmarks.rules import find
from deploykit.runtimes import parse_device

PEAKS = Peaks(100.0, 400.0, None, 10e9, 2, "made up")
CONTEXT = Context("model.onnx", PEAKS, cores=4, threads=2, others=0.0)
ORT = "CPUExecutionProvider"


def conv(name: str, us: float, *, op: str = "Conv", precision: str = "float32", on: str = ORT, of_peak: float = 0.6,
         **more: Any) -> Kernel:  # fmt: skip
    """A convolution as fast as a share of the peak."""
    gops = PEAKS.gops(precision) or 0
    source = SourceNode(name, "Conv", (f"{name}_in", f"{name}_w"), (f"{name}_out",), int(us * of_peak * gops * 1e3 / 2),
                        weights=frozenset({f"{name}_w"}), compute=True, **more)  # fmt: skip
    return Kernel(name, op, on, precision, us, 1000, nodes=(source,))


def other(name: str, op: str, us: float, *, inputs: str = "a", outputs: str = "b", on: str = ORT) -> Kernel:
    """Something that only moves data, as fast as the memory."""
    source = SourceNode(name, op, tuple(inputs.split()), tuple(outputs.split()))
    return Kernel(name, op, on, "float32", us, int(us * 8e3), nodes=(source,))


def profile(*kernels: Kernel, total: float | None = None) -> Profile:
    """A run of them; their nodes are those that they carry."""
    bare = [replace(k, nodes=()) for k in kernels]
    folded, layers = fold(bare, [n for k in kernels for n in k.nodes])
    spent = sum(k.time_us for k in kernels) if total is None else total
    return Profile("ort:cpu", ORT, tuple(folded), tuple(layers), spent, spent, frozenset({"x"}), frozenset({"y"}))


def kinds(made: Profile, context: Context = CONTEXT) -> dict[str, str]:
    return {f.kind: f.severity for f in find(made, context)}


def only(made: Profile, kind: str, context: Context = CONTEXT) -> Finding:
    (found,) = (f for f in find(made, context) if f.kind == kind)
    return found


FLOAT = [conv("one", 900), conv("two", 600), other("pool", "GlobalAveragePool", 60)]
INT8 = [
    other("in", "QuantizeLinear", 200, inputs="x s z"),
    conv("one", 400, op="QLinearConv", precision="int8", quantized=True),
    conv("two", 300, op="QLinearConv", precision="int8", quantized=True),
    other("out", "DequantizeLinear", 200, outputs="y"),
]


def test_healthy_profiles_have_no_finding_even_where_the_ends_are_converted() -> None:
    assert kinds(profile(*FLOAT)) == {}
    assert kinds(profile(*INT8)) == {}


def test_nodes_elsewhere_are_named_with_their_share() -> None:
    made = profile(*FLOAT, conv("lost", 500, on="ElsewhereExecutionProvider"))
    found = only(made, "wrong-provider")
    assert (found.nodes, found.cost_us, found.severity) == (("lost",), 500, "medium")
    assert (
        "1 of 4 nodes ran on ElsewhereExecutionProvider instead of CPUExecutionProvider, 24% of the time" in found.what
    )
    assert kinds(profile(*FLOAT, other("shape", "Shape", 5, on="ElsewhereExecutionProvider"))) == {}


def test_everything_elsewhere_is_grave_however_short() -> None:
    gone = replace(profile(*FLOAT), asked="CUDAExecutionProvider")
    found = only(gone, "wrong-provider")
    assert found.severity == "high"
    assert "--device ort:cpu" in found.cure


@pytest.mark.parametrize(
    ("device", "asked", "on", "named"),
    [("ort:cuda", "CUDAExecutionProvider", "XnnpackExecutionProvider", "ort:xnnpack"),
     ("openvino:hetero:gpu,cpu", "GPU", "CPU", "openvino:cpu"), ("torch:cuda", "cuda", "cpu", "torch:cpu"),
     ("openvino:auto", "GPU", "NPU,CPU", "openvino:npu"), ("openvino:auto", "GPU", "", "openvino:cpu")],
)  # fmt: skip
def test_the_device_to_measure_on_has_a_name_that_a_command_takes(device: str, asked: str, on: str, named: str) -> None:
    gone = replace(profile(conv("one", 900, on=on)), device=device, asked=asked)
    assert f"(--device {named})" in only(gone, "wrong-provider").cure
    parse_device(named)


def test_layers_meant_for_integers_that_run_in_float_are_unfused() -> None:
    pairs = [other("q", "QuantizeLinear", 40), other("dq", "DequantizeLinear", 40)]
    found = only(profile(*INT8, conv("three", 700, quantized=True), *pairs), "unfused-qdq")
    assert found.nodes == ("three", "q", "dq")
    assert found.severity == "high"
    assert "1 of 3 layers that are int8 in the file" in found.what
    assert "deploykit quantize repair -m model.onnx" in found.cure


def test_a_cheap_conversion_between_layers_is_not_worth_a_word() -> None:
    assert kinds(profile(*INT8, other("dq", "DequantizeLinear", 60))) == {}
    assert kinds(profile(*INT8, other("dq", "DequantizeLinear", 200))) == {"unfused-qdq": "medium"}


def test_weights_that_become_floats_in_every_run() -> None:
    unpack = other("unpack", "DequantizeLinear", 400, inputs="one_w s z", outputs="one_f")
    found = only(profile(*FLOAT, unpack), "weights-dequantized")
    assert (found.nodes, found.severity) == (("unpack",), "medium")
    assert "unfused-qdq" not in kinds(profile(*FLOAT, unpack))


def test_float_layers_among_int8_ones_and_the_conversions_around_them() -> None:
    island = [conv("float", 500), other("dq", "DequantizeLinear", 100), other("q", "QuantizeLinear", 100)]
    found = only(profile(*INT8, *island), "float-islands")
    assert found.nodes == ("float",)
    assert found.cost_us == 700
    assert "1 of 3 layers stayed in floating point" in found.what
    assert "unfused-qdq" not in kinds(profile(*INT8, *island))
    assert kinds(profile(*INT8, conv("small", 60))) == {}


def test_int8_data_in_operators_on_integers() -> None:
    slow = [conv("one", 9000, op="QLinearConv", precision="int8", of_peak=0.01, signed=True)]
    assert kinds(profile(*slow)) == {"signed-activations": "high"}
    assert "signed-activations" not in kinds(profile(*slow), replace(CONTEXT, x86=False))


def test_int8_without_a_dot_product() -> None:
    old = replace(CONTEXT, int8_dot=False, peaks=replace(PEAKS, int8_gops=90.0))
    assert kinds(profile(*INT8), old) == {"no-vnni": "high"}
    assert kinds(profile(*FLOAT), old) == {}
    found = only(profile(*INT8), "no-vnni", old)
    assert "0.9x of float32" in found.what
    assert found.cure.startswith("run the float model on this machine")
    assert "--weight-bits 7" in found.cure
    assert "--weight-bits" not in only(profile(*INT8), "no-vnni", replace(old, x86=False)).cure


def test_int8_that_is_faster_all_the_same_is_not_to_be_given_up() -> None:
    found = only(profile(*INT8), "no-vnni", replace(CONTEXT, int8_dot=False))
    assert "4.0x of float32" in found.what
    assert found.severity == "low"
    assert "run the float model" not in found.cure
    assert "deploykit benchmark -m FLOAT_MODEL -m model.onnx" in found.cure


def test_convolutions_that_are_quantized_dynamically() -> None:
    dynamic = [other("range", "DynamicQuantizeLinear", 50), conv("one", 900, op="ConvInteger", precision="int8")]
    found = only(profile(*dynamic), "dynamic-convolution")
    assert (found.nodes, found.cost_us) == (("one",), 950)
    assert "deploykit quantize static" in found.cure


@pytest.mark.parametrize(
    ("op", "word"), [("MemcpyToHost", "I/O binding"), ("Transpose", "channels first"), ("Cast", "element type"),
                     ("ReorderInput", "layout"), ("Convert", "element type"), ("Reorder", "layout")]
)  # fmt: skip
def test_copies_have_the_cure_of_their_kind(op: str, word: str) -> None:
    found = only(profile(*FLOAT, other("copy", op, 400)), "copies")
    assert (found.nodes, found.severity) == (("copy",), "medium")
    assert word in found.cure
    assert kinds(profile(*FLOAT, other("copy", op, 90))) == {}


def test_a_layer_far_from_every_roof_is_named_unless_it_is_explained() -> None:
    slow = conv("deformed", 2000, of_peak=0.01)
    found = only(profile(*FLOAT, slow), "slow-kernel")
    assert (found.nodes, found.severity) == (("deformed",), "high")
    assert kinds(profile(*FLOAT, conv("fine", 2000, of_peak=0.3))) == {}
    unfused = conv("deformed", 2000, of_peak=0.01, quantized=True)
    assert kinds(profile(*INT8, unfused)) == {"unfused-qdq": "high"}


def test_a_tiny_model_is_told_to_batch() -> None:
    tiny = [replace(other(n, "Relu", 4), moved_bytes=64) for n in ("a1", "a2")]
    found = only(profile(*tiny, total=20), "overhead")
    assert (found.severity, found.cost_us) == ("medium", 20)
    assert "--batch" in found.cure
    assert "overhead" not in kinds(profile(*FLOAT, total=90_000))


def test_a_neighbour_counts_only_where_it_takes_cores_that_are_needed() -> None:
    assert kinds(profile(*FLOAT), replace(CONTEXT, others=1.9)) == {}
    assert kinds(profile(*FLOAT), replace(CONTEXT, others=2.4)) == {"loaded-machine": "low"}
    assert kinds(profile(*FLOAT), replace(CONTEXT, others=3.5)) == {"loaded-machine": "medium"}
    assert kinds(profile(*FLOAT), replace(CONTEXT, others=None)) == {}


def test_the_cure_for_a_busy_machine_needs_no_cores_that_it_lacks() -> None:
    for cores, others, cure in ((4, 2.4, "--threads 1"), (2, 0.8, "--threads 1"), (2, 1.5, "nothing else runs")):
        found = only(profile(*FLOAT), "loaded-machine", replace(CONTEXT, cores=cores, others=others))
        assert found.cure.endswith(cure)
        assert "taskset" not in found.cure


def test_the_gravest_comes_first() -> None:
    made = [Finding(k, s, "w", "c", (), c) for k, s, c in (("a", "low", 9.0), ("b", "high", 1.0), ("c", "high", 2.0))]
    assert [f.kind for f in in_order(made)] == ["c", "b", "a"]


# --- views ------------------------------------------------------------------------------------------------------------


def record(made: Profile, context: Context = CONTEXT) -> dict[str, Any]:
    return {
        "label": "model on ort:cpu", "device": "ort:cpu", "total_us": made.total_us, "profiled_us": made.profiled_us,
        "layers": rows(made, PEAKS), "unattributed_us": made.unattributed_us,
        "peak": PEAKS.as_dict() | {"loaded": False}, "roofline": whole(made, PEAKS), "placement": None, "notes": [],
        "findings": [f.as_dict() for f in find(made, context)],
    }  # fmt: skip


def test_rows_hold_what_the_report_promises() -> None:
    (first, *_) = rows(profile(*FLOAT), PEAKS)
    assert first["name"] == "one"
    assert first["share"] == pytest.approx(900 / 1560, abs=1e-3)
    assert (first["bound"], first["of_peak"]) == ("compute", pytest.approx(0.6, abs=1e-3))
    assert first["gflops"] == pytest.approx(60, abs=0.1)
    assert set(first) >= {"op", "kernel", "on", "precision", "time_us", "macs", "bytes", "gbytes_per_s", "kernels"}


def test_the_whole_is_held_to_the_peak_of_each_precision() -> None:
    found = whole(profile(*INT8[1:3]), PEAKS)
    assert found["of_compute_peak"] == pytest.approx(0.6, abs=1e-3)
    assert found["bound"] == "compute"


def test_text_names_layers_findings_and_cures() -> None:
    text = explanation_text(record(profile(*FLOAT, other("copy", "Cast", 600))))
    assert text.startswith("model on ort:cpu:\n")
    for words in ("one", "copies", "cure: keep one element type", "100 GFLOP/s float32", "10.0 GB/s"):
        assert words in text
    assert "nothing stands out" in explanation_text(record(profile(*FLOAT)))


def test_only_ten_layers_are_shown_and_the_others_summed() -> None:
    text = explanation_text(record(profile(*(conv(f"c{i:02}", 100) for i in range(13)))))
    assert "c09" in text
    assert "c10" not in text
    assert "and 3 more layers, 23.1% of the time" in text


@pytest.mark.parametrize("render", [explanation_text, explanation_markdown])
def test_names_cannot_steer_the_terminal(render: Any) -> None:
    made = profile(*FLOAT, other("evil\x1b[2Jname\nline", "Cast", 600))
    shown = render(record(made))
    assert "\x1b" not in shown
    assert "evil" in shown


def test_markdown_escapes_names_and_has_a_table() -> None:
    shown = explanation_markdown(record(profile(*FLOAT, other("a|b*", "Cast", 600))))
    assert "a\\|b\\*" in shown
    assert shown.startswith("### model on ort:cpu\n")
    assert "|---|" in shown
    assert "**copies** (high" in shown or "**copies** (medium" in shown


def test_a_refusal_has_no_table() -> None:
    refused = {"label": "m on d", "device": "d", "total_us": None, "layers": [], "notes": [],
               "findings": [Finding("wrong-provider", "high", "no node runs", "choose another").as_dict()]}  # fmt: skip
    assert "cure: choose another" in explanation_text(refused)
    assert "**wrong-provider**" in explanation_markdown(refused)
