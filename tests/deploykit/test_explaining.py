"""Setups that are really broken, and what is said about them; times are never compared, only what was tried."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from deploykit import explaining
from deploykit.benchmarks import experiments, trials
from deploykit.benchmarks.experiments import Setup
from deploykit.benchmarks.roofline import Peaks
from deploykit.benchmarks.trials import Trial
from deploykit.data import Dataset
from deploykit.errors import DataError, DeviceError
from deploykit.explaining import explain_model, explanation_text, source_nodes
from deploykit.machine import inspect_machine
from deploykit.optimizers import StaticConfig, optimize
from deploykit.runtimes import Device, open_session
from deploykit.runtimes.placement import NodePlacement, Placement
from deploykit.specs import Feeds

F32 = np.float32
RNG = np.random.default_rng(0)
IMAGE = {"x": RNG.standard_normal((1, 3, 32, 32)).astype(F32)}
FASTER = Trial(2.0, 1.0, 2.0, 1.9)
SAME = Trial(1.0, 1.0, 1.0, 0.9)
DEVICES = ["ort:cpu", "openvino:cpu"]


def normal(*shape: int, scale: float = 0.2) -> Any:
    return (RNG.standard_normal(shape) * scale).astype(F32)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Peaks that need no measuring, trials that all say "no difference", and a record of what was tried."""
    tried: dict[str, list[Any]] = {"turns": [], "threads": [], "processes": []}
    monkeypatch.setattr(explaining, "measure_peaks", lambda d, threads, p: Peaks(1.0, 4.0, None, 1e9, threads, "made"))
    monkeypatch.setattr(explaining, "_PROFILED_US", 2000.0)
    monkeypatch.setattr(trials, "_TOTAL_S", 0.02)
    monkeypatch.setattr(explaining.LoadMeter, "others", lambda self: 0.0)

    def turns(first: Any, second: Any, *, quick: bool = True) -> Trial:
        tried["turns"].append((first(), second()))
        return SAME

    def one_after_another(first: Any, second: Any, feeds: Feeds) -> Trial:
        for make in (first, second):
            with make() as session:
                session.run(feeds)
                tried["threads"].append(session.settings.get("intra_op_num_threads"))
        return FASTER

    def processes(
        path: Path, device: str, feeds: Feeds, threads: int, precision: str, sides: Any, least: float, *, optimize: Any
    ) -> Trial:
        tried["processes"].append(sides)
        return FASTER

    monkeypatch.setattr(experiments, "in_turns", turns)
    monkeypatch.setattr(experiments, "one_after_another", one_after_another)
    monkeypatch.setattr(experiments, "in_processes", processes)
    return tried


def gaining(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "in_turns", lambda a, b, quick=True: (a(), b(), FASTER)[-1])


@pytest.fixture
def net(build: Any, save: Any, tmp_path: Path) -> Any:
    """Two convolutions and a Gemm; `pairs` puts Q/DQ pairs before each convolution and none behind it."""

    def make(*, pairs: bool = False, batch: int | str = 1, scale: float = 0.2) -> Path:
        weights: dict[str, Any] = {"s": F32(0.05), "z": np.uint8(128), "wz": np.int8(0), "wh": normal(16, 5)}
        nodes, x, inner = [], "x", 3
        for name in ("stem", "body"):
            weight = f"{name}_w"
            if pairs:
                weights[weight] = RNG.integers(-90, 90, (16, inner, 3, 3)).astype(np.int8)
                nodes += [
                    helper.make_node("QuantizeLinear", [x, "s", "z"], [f"{name}_q"], name=f"{name}_quantize"),
                    helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [f"{name}_x"], name=f"{name}_back"),
                    helper.make_node("DequantizeLinear", [weight, "s", "wz"], [f"{name}_wf"], name=f"{name}_unpack"),
                ]
                x, weight = f"{name}_x", f"{name}_wf"
            else:
                weights[weight] = normal(16, inner, 3, 3, scale=scale)
            nodes += [
                helper.make_node("Conv", [x, weight], [f"{name}_c"], name=name, pads=[1] * 4),
                helper.make_node("Relu", [f"{name}_c"], [f"{name}_r"], name=f"{name}_relu"),
            ]
            x, inner = f"{name}_r", 16
        nodes += [
            helper.make_node("GlobalAveragePool", [x], ["g"], name="pool"),
            helper.make_node("Flatten", ["g"], ["f"], name="flat"),
            helper.make_node("Gemm", ["f", "wh"], ["y"], name="head"),
        ]
        model = build(nodes, {"x": [batch, 3, 32, 32]}, {"y": [batch, 5]}, weights)
        return save(model, tmp_path, f"{pairs}-{batch}-{scale}.onnx")

    return make


def kinds(found: dict[str, Any]) -> set[str]:
    return {f["kind"] for f in found["findings"]} - {"loaded-machine", "overhead", "slow-kernel"}


def only(found: dict[str, Any], kind: str) -> dict[str, Any]:
    (finding,) = (f for f in found["findings"] if f["kind"] == kind)
    return dict(finding)


# --- what every explanation holds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_layers_have_the_names_of_the_file_with_exact_macs(net: Any, device: str) -> None:
    found = explain_model(net(), device, IMAGE)
    macs = {layer["name"]: layer["macs"] for layer in found["layers"] if layer["macs"]}
    assert macs == {"stem": 16 * 27 * 32 * 32, "body": 16 * 144 * 32 * 32, "head": 80}
    assert found["total_us"] > 0
    assert sum(layer["time_us"] for layer in found["layers"]) == pytest.approx(found["profiled_us"], abs=0.5)
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1, abs=0.01)
    times = [layer["time_us"] for layer in found["layers"]]
    assert times == sorted(times, reverse=True)
    assert found["placement"]["share_of_time"] == 1.0
    assert all(layer["bytes"] for layer in found["layers"] if layer["macs"])
    assert json.loads(json.dumps(found)) == found
    assert "stem" in explanation_text(found)


@pytest.mark.parametrize("device", DEVICES)
def test_a_healthy_float_model_is_not_blamed(net: Any, device: str) -> None:
    # Of so small a net a copy at the entrance is a part of the time that counts.
    assert kinds(explain_model(net(), device, IMAGE)) <= {"copies"}


@pytest.mark.parametrize("device", DEVICES)
def test_a_healthy_int8_model_is_not_blamed(net: Any, tmp_path: Path, device: str) -> None:
    target = tmp_path / "int8.onnx"
    data = Dataset.from_arrays({"x": RNG.standard_normal((8, 3, 32, 32)).astype(F32)})
    # SmoothQuant may put a product before the Gemm, by what it measures here: in so small a net its pairs would count.
    optimize(net(), StaticConfig(batch_size=1, smooth="off"), target, check=lambda path: None, data=data,
             open_model=lambda path: open_session(path, threads=1).run)  # fmt: skip
    here = inspect_machine()
    modern = replace(here, flags=here.flags | {"vnni": True})  # without it, int8 is a finding of its own
    found = explain_model(target, device, IMAGE, machine=modern)
    convolutions = {layer["name"]: layer for layer in found["layers"] if layer["name"] in ("stem", "body")}
    assert {layer["precision"] for layer in convolutions.values()} == {"int8"}
    assert [layer["macs"] for layer in convolutions.values()].count(None) == 0
    assert kinds(found) <= {"copies"}


def test_a_model_is_explained_at_the_level_it_is_run_with(net: Any) -> None:
    names = {level: {n["name"] for n in explain_model(net(), "ort:cpu", IMAGE, optimize=level)["layers"]}
             for level in (True, False)}  # fmt: skip
    assert "stem_relu" in names[False]
    assert "stem_relu" not in names[True]


@pytest.mark.parametrize(
    ("target", "places", "wanted"),
    [("AUTO:GPU,CPU", ["CPU"], "GPU"), ("AUTO:GPU,CPU", ["GPU.0"], "GPU.0"), ("AUTO:-GPU", ["CPU"], "asked"),
     ("BATCH:GPU(4)", ["GPU.0"], "GPU.0"), ("MULTI:-GPU,NPU", ["NPU"], "NPU"), ("CPU", ["CPU"], "asked")],
)  # fmt: skip
def test_what_a_virtual_device_should_run_on(target: str, places: list[str], wanted: str) -> None:
    placement = Placement("asked", tuple(NodePlacement("n", "Conv", place, "float32", 1.0) for place in places))
    assert explaining._wanted(Device("openvino", target), placement) == wanted


def test_an_ir_has_kernels_for_layers_and_says_so(net: Any, tmp_path: Path) -> None:
    import openvino as ov

    ov.save_model(ov.convert_model(str(net())), str(tmp_path / "net.xml"))
    found = explain_model(tmp_path / "net.xml", "openvino:cpu", IMAGE)
    assert found["layers"]
    assert "layers are kernels" in found["notes"][0]


@pytest.mark.parametrize("feeds", [{"x": IMAGE["x"][0]}, {"wrong": IMAGE["x"], "other": IMAGE["x"]}])
def test_feeds_that_do_not_fit_are_an_error_of_ours(net: Any, feeds: Feeds) -> None:
    with pytest.raises(DataError):
        explain_model(net(), "ort:cpu", feeds)


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"precision": "fp64"}])
def test_arguments_without_sense_are_no_finding(net: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(DeviceError):
        explain_model(net(), "ort:cpu", IMAGE, **wrong)


def test_bodies_count_once_and_in_every_turn(build: Any, save: Any, tmp_path: Path) -> None:
    """The profile of a loop holds its body: 4 turns of it are a run, and the loop's own time is what is left."""
    body = helper.make_graph(
        [helper.make_node("MatMul", ["state", "w"], ["next"], name="inner"),
         helper.make_node("Identity", ["go"], ["on"], name="same")], "body",
        [helper.make_tensor_value_info("turn", 7, []), helper.make_tensor_value_info("go", 9, []),
         helper.make_tensor_value_info("state", 1, [64, 64])],
        [helper.make_tensor_value_info("on", 9, []), helper.make_tensor_value_info("next", 1, [64, 64])],
    )  # fmt: skip
    model = build([helper.make_node("Loop", ["count", "true", "x"], ["y"], name="loop", body=body)],
                  {"x": [64, 64]}, {"y": [64, 64]},
                  {"w": normal(64, 64), "count": np.int64(4), "true": np.bool_(True)})  # fmt: skip
    path = save(model, tmp_path)
    feeds = {"x": np.ones((64, 64), F32)}
    with open_session(path, threads=1) as session:
        times = {n.name: n.time_us for n in session.placement(feeds, runs=5).nodes}
    found = explain_model(path, "ort:cpu", feeds, threads=1)
    layers = {layer["name"]: layer["time_us"] for layer in found["layers"]}
    assert layers["loop"] < times["loop"]
    assert "inner" in layers


# --- broken setups ----------------------------------------------------------------------------------------------------


def test_a_provider_that_takes_no_node_is_named_with_the_one_that_does(net: Any) -> None:
    found = explain_model(net(), "ort:AzureExecutionProvider", IMAGE, label="net on azure")
    finding = only(found, "wrong-provider")
    assert finding["severity"] == "high"
    assert "ran on CPUExecutionProvider instead of AzureExecutionProvider, 100% of the time" in finding["what"]
    assert "--device ort:cpu" in finding["cure"]
    assert {"stem", "body"} <= set(finding["nodes"])
    assert found["placement"]["share_of_nodes"] == 0
    assert found["layers"] == []
    assert "net on azure" in explanation_text(found)


def test_a_provider_that_is_not_there_is_named_with_its_wheel(net: Any) -> None:
    finding = only(explain_model(net(), "ort:tensorrt", IMAGE), "wrong-provider")
    assert "has no TensorrtExecutionProvider" in finding["what"]
    assert "onnxruntime-gpu" in finding["cure"]


def test_a_part_of_the_nodes_elsewhere_is_named(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploykit.runtimes.ort import OrtSession

    real = OrtSession._placement

    def partly(self: Any, feeds: Feeds, runs: int) -> Any:
        placement = real(self, feeds, runs)
        moved = [replace(n, on="XnnpackExecutionProvider") if n.op == "Conv" else n for n in placement.nodes]
        return replace(placement, asked="XnnpackExecutionProvider", nodes=tuple(moved))

    monkeypatch.setattr(OrtSession, "_placement", partly)
    finding = only(explain_model(net(), "ort:cpu", IMAGE), "wrong-provider")
    assert "head" in finding["nodes"]
    assert "stem" not in finding["nodes"]


def test_more_threads_than_cores_are_tried_against_those_allowed(net: Any, quick: dict[str, list[Any]]) -> None:
    machine = replace(inspect_machine(), cores_allowed=2)
    found = explain_model(net(), "ort:cpu", IMAGE, threads=4, machine=machine)
    assert quick["threads"] == [4, 2]
    finding = only(found, "oversubscribed-threads")
    assert "4 threads share the 2 cores" in finding["what"]
    assert finding["cure"].startswith("--threads 2")
    assert finding["severity"] == "high"
    assert found["peak"]["threads"] == 2


def test_as_many_threads_as_cores_are_not_tried(net: Any, quick: dict[str, list[Any]]) -> None:
    machine = replace(inspect_machine(), cores_allowed=2)
    assert "oversubscribed-threads" not in kinds(explain_model(net(), "ort:cpu", IMAGE, threads=2, machine=machine))
    assert quick["threads"] == []


def test_pairs_that_onnx_runtime_does_not_fuse_are_named(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaining(monkeypatch)
    path = net(pairs=True).rename(tmp_path / "two words.onnx")
    finding = only(explain_model(path, "ort:cpu", IMAGE), "unfused-qdq")
    assert {"stem", "body"} <= set(finding["nodes"])
    assert "2 of 2 layers that are int8 in the file are computed in floating point" in finding["what"]
    assert "repaired, the model is 2.00x as fast" in finding["what"]
    assert finding["cure"] == f"deploykit quantize repair -m '{path}' -o DIR"


def test_where_a_repair_does_not_help_the_cure_is_another(net: Any) -> None:
    finding = only(explain_model(net(pairs=True), "ort:cpu", IMAGE), "unfused-qdq")
    assert "a repair of the file does not help here" in finding["cure"]
    assert "deploykit quantize static" in finding["cure"]


def test_int8_data_of_integer_operators_are_named(build: Any, save: Any, tmp_path: Path) -> None:
    weights = {"s": F32(0.05), "z": np.int8(0), "w": RNG.integers(-90, 90, (32, 32, 3, 3)).astype(np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="in"),
        helper.make_node("QLinearConv", ["q", "s", "z", "w", "s", "z", "s", "z"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"], name="out"),
    ]
    path = save(build(nodes, {"x": [1, 32, 32, 32]}, {"y": [1, 32, 32, 32]}, weights), tmp_path)
    assert [n.name for n in source_nodes(path, {}) if n.signed] == ["conv"]
    finding = only(explain_model(path, "ort:cpu", {"x": normal(1, 32, 32, 32)}), "signed-activations")
    assert finding["nodes"] == ["conv"]
    arm = replace(inspect_machine(), architecture="aarch64")
    assert "signed-activations" not in kinds(explain_model(path, "ort:cpu", {"x": normal(1, 32, 32, 32)}, machine=arm))


def test_int8_pairs_are_blamed_only_where_a_repair_is_faster(
    build: Any, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"s": F32(0.05), "z": np.int8(0), "w": RNG.integers(-90, 90, (16, 16, 3, 3)).astype(np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="in"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="in_back"),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wf"], name="unpack"),
        helper.make_node("Conv", ["d", "wf"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["p"], name="out"),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"], name="out_back"),
    ]
    path = save(build(nodes, {"x": [1, 16, 16, 16]}, {"y": [1, 16, 16, 16]}, weights), tmp_path)
    feeds = {"x": normal(1, 16, 16, 16)}
    assert "signed-activations" not in kinds(explain_model(path, "ort:cpu", feeds))
    gaining(monkeypatch)
    finding = only(explain_model(path, "ort:cpu", feeds), "signed-activations")
    assert finding["nodes"] == ["in", "out"]
    assert finding["cure"] == f"deploykit quantize repair -m {path} -o DIR"


def test_int8_without_a_dot_product_is_named(net: Any, tmp_path: Path) -> None:
    here = inspect_machine()
    target = tmp_path / "int8.onnx"
    data = Dataset.from_arrays({"x": RNG.standard_normal((8, 3, 32, 32)).astype(F32)})
    optimize(net(), StaticConfig(batch_size=1), target, check=lambda path: None, data=data,
             open_model=lambda path: open_session(path, threads=1).run)  # fmt: skip
    old = replace(here, flags=dict.fromkeys(here.flags, False))
    finding = only(explain_model(target, "ort:cpu", IMAGE, machine=old), "no-vnni")
    assert {"stem", "body"} <= set(finding["nodes"])
    new = replace(here, flags=here.flags | {"vnni": True})
    assert "no-vnni" not in kinds(explain_model(target, "ort:cpu", IMAGE, machine=new))


def test_open_dimensions_are_tried_fixed_with_the_same_outputs(
    net: Any, quick: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = net(batch="n")
    feeds = {"x": normal(2, 3, 32, 32)}
    explain_model(path, "ort:cpu", feeds)
    (pair,) = quick["turns"]
    np.testing.assert_allclose(pair[0]["y"], pair[1]["y"], rtol=1e-5)
    gaining(monkeypatch)
    finding = only(explain_model(path, "ort:cpu", feeds), "dynamic-shapes")
    assert "with n=2 fixed" in finding["what"]
    assert "deploykit export SOURCE --dynamic none --input 'x=float32[2,3,32,32]'" in finding["cure"]


def test_the_fixed_copy_has_no_open_dimension_and_keeps_external_weights(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = net(batch="n")
    folder = tmp_path / "external"
    folder.mkdir()
    onnx.save(onnx.load(str(source)), str(folder / "m.onnx"), save_as_external_data=True, size_threshold=0,
              location="sub.data")  # fmt: skip
    opened: list[Any] = []
    real = Setup.open

    def watch(self: Setup, **changed: Any) -> Any:
        session = real(self, **changed)
        if "path" in changed:
            opened.append([s.shape for s in (*session.signature.inputs, *session.signature.outputs)])
        return session

    monkeypatch.setattr(Setup, "open", watch)
    explain_model(folder / "m.onnx", "ort:cpu", {"x": normal(2, 3, 32, 32)})
    assert opened == [[(2, 3, 32, 32), (2, 5)]]


def test_fixed_shapes_are_not_tried(net: Any, quick: dict[str, list[Any]]) -> None:
    explain_model(net(), "ort:cpu", IMAGE)
    assert quick["turns"] == []


def test_subnormal_weights_are_counted_and_tried(net: Any, quick: dict[str, list[Any]]) -> None:
    path = net(scale=1e-39)
    assert set(experiments.subnormal_weights(onnx.load(str(path)), path.parent)) == {"stem_w", "body_w"}
    finding = only(explain_model(path, "ort:cpu", IMAGE), "denormals")
    assert finding["nodes"] == ["stem_w", "body_w"]
    assert "settings={'session.set_denormal_as_zero': '1'}" in finding["cure"]
    ((off, on),) = quick["processes"]
    assert (off["session.set_denormal_as_zero"], on["session.set_denormal_as_zero"]) == ("0", "1")


def test_a_session_that_flushes_already_is_not_told_to(net: Any, quick: dict[str, list[Any]]) -> None:
    path = net(scale=1e-39)
    for yes in ("1", True):
        explain_model(path, "ort:cpu", IMAGE, settings={"session.set_denormal_as_zero": yes})
    assert quick["processes"] == []


def test_sixteen_bits_are_tried_where_the_cpu_has_them(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gaining(monkeypatch)
    here = inspect_machine()
    modern = replace(here, flags=here.flags | {"bf16": True})
    finding = only(explain_model(net(), "openvino:cpu", IMAGE, machine=modern), "unused-precision")
    assert (finding["severity"], finding["cure"].split(",")[0]) == ("low", "--precision native")
    plain = replace(here, flags=dict.fromkeys(here.flags, False))
    assert "unused-precision" not in kinds(explain_model(net(), "openvino:cpu", IMAGE, machine=plain))


def test_a_busy_neighbour_is_named_and_spinning_tried(
    net: Any, monkeypatch: pytest.MonkeyPatch, quick: dict[str, list[Any]]
) -> None:
    machine = replace(inspect_machine(), cores_allowed=2, cores_machine=2)
    monkeypatch.setattr(explaining.LoadMeter, "others", lambda self: 1.5)
    found = explain_model(net(), "ort:cpu", IMAGE, machine=machine)
    assert only(found, "loaded-machine")["severity"] == "medium"
    assert found["peak"]["loaded"] is True
    assert len(quick["turns"]) == 1
    for no in ("0", False):
        settings = {"session.intra_op.allow_spinning": no}
        explain_model(net(), "ort:cpu", IMAGE, machine=machine, settings=settings)
    assert len(quick["turns"]) == 1
    gaining(monkeypatch)
    cure = only(explain_model(net(), "ort:cpu", IMAGE, machine=machine), "spinning-threads")["cure"]
    assert "settings={'session.intra_op.allow_spinning': '0'}" in cure


@pytest.mark.parametrize("device", DEVICES)
def test_moved_bytes_are_those_of_the_tensors_and_weights(build: Any, save: Any, tmp_path: Path, device: str) -> None:
    path = save(build([helper.make_node("MatMul", ["x", "w"], ["y"], name="p")], {"x": [4, 8]}, {"y": [4, 16]},
                      {"w": normal(8, 16)}), tmp_path)  # fmt: skip
    (layer,) = explain_model(path, device, {"x": normal(4, 8)})["layers"]
    assert (layer["name"], layer["bytes"]) == ("p", 4 * (4 * 8 + 8 * 16 + 4 * 16))


@pytest.mark.parametrize("device", DEVICES)
def test_of_a_table_only_the_rows_that_are_looked_up_are_moved(
    build: Any, save: Any, tmp_path: Path, device: str
) -> None:
    model = build([helper.make_node("Gather", ["table", "x"], ["rows"], name="look"),
                   helper.make_node("MatMul", ["rows", "w"], ["y"], name="p")],
                  {"x": [2000]}, {"y": [2000, 16]}, {"table": normal(20000, 64), "w": normal(64, 16)})  # fmt: skip
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    path = save(model, tmp_path)
    rows = 2000 * 64 * 4
    (look,) = (node for node in source_nodes(path, {}) if node.name == "look")
    assert look.moved_bytes == 2 * rows + 2000 * 8
    found = {layer["name"]: layer["bytes"] for layer in explain_model(path, device, {"x": np.arange(2000)})["layers"]}
    assert 2 * rows <= found["look"] <= 2 * rows + 2000 * 8


# --- in a benchmark ---------------------------------------------------------------------------------------------------


def test_candidates_with_other_outputs_are_left_out_and_failures_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    from deploykit.benchmarks import Candidate
    from deploykit.errors import InferenceError
    from deploykit.progress import Progress

    asked: list[Any] = []

    def explain(path: str, device: str, feeds: Any, **options: Any) -> dict[str, Any]:
        asked.append((path, device, options["precision"], options["threads"], options["optimize"]))
        if path == "crash":
            raise InferenceError("it crashed")
        return {"findings": []}

    monkeypatch.setattr(explaining, "explain_model", explain)
    names = ["good", "wrong", "crash", "refused"]
    candidates = [Candidate(n, n, "ort:cpu", "", 0, "native" if n == "good" else None) for n in names]
    candidates[-1] = replace(candidates[-1], optimize="basic")
    told = Progress()
    found = explaining.explain_candidates(
        candidates, ["ok", "wrong outputs: cosine", "ok", "failed: no"], [], threads=3, precision="fp32", progress=told
    )
    assert list(found) == ["good on ort:cpu", "refused on ort:cpu"]
    assert asked[0] == ("good", "ort:cpu", "native", 3, True)
    assert asked[1:] == [("crash", "ort:cpu", "fp32", 3, True), ("refused", "ort:cpu", "fp32", 3, "basic")]
    assert told.notes == ["crash on ort:cpu is not explained: it crashed"]


@pytest.mark.parametrize("wanted", [False, True])
def test_a_benchmark_explains_only_when_it_is_asked(net: Any, monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    import deploykit
    from deploykit import benchmarks
    from deploykit.benchmarks import Report

    report = Report({"candidates": [{"status": "ok"}], "interrupted": False})
    monkeypatch.setattr(benchmarks, "measure", lambda *args, **options: report)
    monkeypatch.setattr(explaining, "explain_model", lambda *args, **options: {"findings": [], "of": options["label"]})
    path = net()
    made = deploykit.benchmark([path], devices=["ort:cpu"], explain=wanted)
    label = f"{path.name} on ort:cpu"
    assert made.data.get("explain") == ({label: {"findings": [], "of": label}} if wanted else None)
