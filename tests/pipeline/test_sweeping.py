"""`quantize sweep`, and the verbs for smaller weights, on a really trained network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import deploykit
from deploykit import gating, pipeline, storing, sweeping
from deploykit.benchmarks import Report
from deploykit.errors import AccuracyError, DataError, InferenceError, OptimizationError, OutputExistsError
from deploykit.optimizers import HalfConfig, WeightsConfig
from deploykit.runtimes.device import parse_device
from deploykit.schemes import SCHEMES

FAST: Any = {"gate_seconds": 0}


def last(artifact: Any) -> Any:
    return artifact.manifest.lineage[-1]


# --- weights and half ------------------------------------------------------------------------------------------------


def test_weights_keep_an_accuracy_target(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    made = pipeline.quantize_weights(
        tmp_path / "net.onnx", tmp_path / "out", eval_data=tmp_path / "eval.npz", metric="accuracy", **FAST
    )
    (record,) = made.manifest.evidence.accuracy
    assert record["certified"] is True and record["value"] >= record["parent"] - 0.01
    assert made.size_bytes < 0.6 * (tmp_path / "net.onnx").stat().st_size
    for proof in made.manifest.evidence.placement:
        assert proof["layers"]["MatMul"] == {"int8": digits.LAYERS - 1, "total": digits.LAYERS - 1}


def test_a_target_is_reached_with_smaller_blocks_then_8_bits(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    source, options = tmp_path / "net.onnx", {"data": tmp_path / "eval.npz", **FAST}
    plain = pipeline.quantize_weights(source, tmp_path / "a", config=WeightsConfig(4, 64), min_sqnr=-9, **options)
    reached = plain.manifest.evidence.accuracy[0]["sqnr_db"]
    made = pipeline.quantize_weights(
        source, tmp_path / "b", config=WeightsConfig(4, 64), min_sqnr=reached + 8, **options
    )
    assert (last(made).params["bits"], last(made).params["evaluations"]) == (8, 3)
    with pytest.raises(AccuracyError, match="cannot be met"):
        pipeline.quantize_weights(source, tmp_path / "c", min_sqnr=300, **options)
    assert not (tmp_path / "c").exists()


def test_a_layer_that_blocks_destroy_stays_in_float(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path, 3, "weight")
    source, options = tmp_path / "net.onnx", {"data": tmp_path / "eval.npz", **FAST}
    plain = pipeline.quantize_weights(source, tmp_path / "a", min_cosine=-1, min_sqnr=-99, **options)
    made = pipeline.quantize_weights(
        source, tmp_path / "b", min_sqnr=plain.manifest.evidence.accuracy[0]["sqnr_db"] + 3, escalate=False,
        min_cosine=-1, **options,
    )  # fmt: skip
    assert last(made).params["float_by_target"]


def test_half_is_half_the_size_and_says_what_it_lost(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    source = tmp_path / "net.onnx"
    made = deploykit.quantize_half(source, tmp_path / "out", **FAST)
    assert last(made).params["compute"] == "storage"  # no device here computes in float16
    for record in made.manifest.evidence.parity:
        assert record["verdict"] == "passed" and 0 < record["outputs"][0]["max_abs"] < 0.1
    assert made.manifest.evidence.placement == []
    native = deploykit.quantize_half(source, tmp_path / "native", config=HalfConfig(compute="native"), **FAST)
    assert native.size_bytes < 0.65 * source.stat().st_size


def test_what_leaves_the_range_of_float16_stays_in_float32(digits: Any, tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider would compute it in float32 and show nothing."""
    digits.write(tmp_path)
    source = tmp_path / "net.onnx"
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.name in ("w1", "b1"):
            values = onnx.numpy_helper.to_array(tensor) * 1e4
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), tensor.name))
    onnx.save(model, source)
    made = pipeline.quantize_half(source, tmp_path / "out", config=HalfConfig(compute="native"), **FAST)
    [note] = [n for n in last(made).notes if "stay in float32" in n]
    assert "layer1 (Gemm, values beyond the range of float16)" in note
    casts = [n for n in onnx.load(made.model_path).graph.node if n.op_type == "Cast"]
    assert any(n.input[0] == "r0" for n in casts)


def test_a_target_that_half_misses_is_told(digits: Any, tmp_path: Path) -> None:
    """There is no layer to leave in float: the precision is that of the whole file."""
    digits.write(tmp_path)
    with pytest.raises(AccuracyError, match=r"cannot be met: SQNR .* \(1 models judged\)"):
        pipeline.quantize_half(
            tmp_path / "net.onnx", tmp_path / "out", data=tmp_path / "eval.npz", min_sqnr=300, **FAST
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "half"),
    [("ort:cuda", True), ("ort:tensorrt", True), ("openvino:gpu", True), ("ort:cpu", False), ("openvino:cpu", False)],
)
def test_devices_that_compute_in_float16_are_known(device: str, half: bool) -> None:
    assert storing._computes_in_half(parse_device(device)) is half


def test_a_tie_is_enough_for_what_is_smaller() -> None:
    tie = {"device": "ort:cpu", "verdict": "tie", "ratio": 1.0, "summary": "tie"}
    assert gating.check_speed([tie], gating.Gate((), tie_allowed=True)) == ""
    with pytest.raises(deploykit.DeploykitError, match="not faster"):
        gating.check_speed([tie], gating.Gate(()))
    with pytest.raises(deploykit.DeploykitError, match="slower than its parent"):
        gating.check_speed([tie | {"verdict": "slower"}], gating.Gate((), tie_allowed=True))


# --- sweep -----------------------------------------------------------------------------------------------------------

QUICK: Any = {"rounds": 3, "seconds": 0.02, "devices": ["ort:cpu"]}


@pytest.fixture(scope="module")
def swept(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sweeping.Sweep]:
    """A whole sweep, and where it is."""
    folder = tmp_path_factory.mktemp("swept")
    digits.write(folder)
    found = pipeline.quantize_sweep(
        folder / "net.onnx", folder / "out", data=folder / "calib.npz", eval_data=folder / "eval.npz",
        metric="accuracy", schemes=["fp16", "weights4", "dynamic", "static"], rounds=3, seconds=0.02,
    )  # fmt: skip
    return folder / "out", found


@pytest.fixture
def measured_once(swept: tuple[Path, sweeping.Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of another measurement, where it does not matter how fast anything is."""
    report = swept[1].data["benchmark"]
    first, other = (dict(entry) for entry in report["candidates"][:2])

    def measure(candidates: Any, *_: Any, **__: Any) -> Report:
        entries = [(first if c is candidates[0] else other) | {"name": c.name, "device": c.device} for c in candidates]
        return Report({**report, "candidates": entries})

    monkeypatch.setattr(sweeping, "measure", measure)


def test_a_sweep_measures_every_scheme_side_by_side(digits: Any, swept: tuple[Path, sweeping.Sweep]) -> None:
    out, found = swept
    rows = {row["scheme"]: row for row in found.rows}
    assert [*rows][:5] == ["parent", "fp16", "weights4", "dynamic", "static"]
    for name in ("fp16", "weights4", "dynamic", "static"):
        row = rows[name]
        assert row["status"] == "ok" and row["size_bytes"] < 1.2 * rows["parent"]["size_bytes"]
        assert (out / name / "manifest.json").is_file()
        for device in ("ort:cpu", "openvino:cpu"):
            assert row["quality"][device]["value"] > 0.8 and row["speed"][device]["ratio"] > 0
    assert rows["static"]["placement"]["ort:cpu"]["layers"]["Gemm"]["int8"] >= digits.LAYERS - 1
    assert rows["parent"]["speed"]["ort:cpu"]["verdict"] == "reference"
    assert json.loads((out / "sweep.json").read_text())["rows"] == found.rows
    assert all(any(note.startswith(device) for note in found.data["notes"]) for device in ("ort:cpu", "openvino:cpu"))
    header, body = sweeping.table(found)
    assert len(body) == len(found.rows) and {len(line) for line in body} == {len(header)}


@pytest.mark.usefixtures("measured_once")
def test_what_fails_is_a_row_with_its_reason(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path, 3, "weight")
    found = pipeline.quantize_sweep(
        tmp_path / "net.onnx", tmp_path / "out", data=tmp_path / "calib.npz", schemes=["fp16", "static"],
        min_cosine=0.9999, **QUICK,
    )  # fmt: skip
    row = next(r for r in found.rows if r["scheme"] == "static")
    assert "not its parent" in row["status"] and not (tmp_path / "out" / "static").exists()
    assert sweeping.table(found)[1][-1][2] == row["status"]


@pytest.mark.usefixtures("measured_once")
def test_without_data_static_schemes_are_left_out_and_said(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    found = pipeline.quantize_sweep(tmp_path / "net.onnx", tmp_path / "out", **QUICK)
    left = {r["scheme"]: r["status"] for r in found.rows if r["status"] != "ok"}
    assert {"static", "static-auto"} <= set(left) and "--data" in left["static"]
    assert "quality" not in found.rows[1]


@pytest.mark.usefixtures("measured_once")
def test_an_interrupted_sweep_goes_on(digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits.write(tmp_path)
    source, out = tmp_path / "net.onnx", tmp_path / "out"

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sweeping, "measure", stop)
        pipeline.quantize_sweep(source, out, schemes=["fp16"], **QUICK)
    with pytest.raises(OutputExistsError, match="--resume"):
        pipeline.quantize_sweep(source, out, schemes=["fp16"], **QUICK)
    with pytest.raises(OutputExistsError, match="this model with these data"):
        pipeline.quantize_sweep(source, out, schemes=["fp16"], data=tmp_path / "calib.npz", resume=True, **QUICK)
    with pytest.raises(OutputExistsError, match="options"):
        pipeline.quantize_sweep(source, out, schemes=["fp16"], min_cosine=0.99, resume=True, **QUICK)
    kept = (out / "fp16" / "manifest.json").stat().st_mtime_ns
    found = pipeline.quantize_sweep(source, out, schemes=["fp16", "weights8"], resume=True, **QUICK)
    assert (out / "fp16" / "manifest.json").stat().st_mtime_ns == kept
    assert {"fp16", "weights8"} <= {r["scheme"] for r in found.rows}
    with pytest.raises(OutputExistsError, match="finished"):
        pipeline.quantize_sweep(source, out, schemes=["fp16"], resume=True, **QUICK)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"schemes": ["int3"]}, OptimizationError),
        ({"schemes": ["static"]}, OptimizationError),
        ({"min_sqnr": 20.0}, DataError),
        ({"metric": "accuracy"}, DataError),
    ],
)
def test_bad_requests_write_nothing(digits: Any, tmp_path: Path, options: Any, error: type[Exception]) -> None:
    digits.write(tmp_path)
    with pytest.raises(error):
        pipeline.quantize_sweep(tmp_path / "net.onnx", tmp_path / "out", **options, **QUICK)
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_read_end_it_before_anything_is_left(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    (tmp_path / "broken.npz").write_bytes(b"PK not really")
    for data in ("missing.npz", "broken.npz"):
        with pytest.raises(DataError):
            pipeline.quantize_sweep(
                tmp_path / "net.onnx", tmp_path / "out", data=tmp_path / data, eval_data=tmp_path / "eval.npz", **QUICK
            )
        assert not (tmp_path / "out").exists()
    with pytest.raises(deploykit.DeploykitError, match="rounds"):
        pipeline.quantize_sweep(tmp_path / "net.onnx", tmp_path / "out", rounds=2)
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_scheme_fits_leaves_nothing_behind(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(n, 1, ["n", 4]) for n in "xy"]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", values[:1], values[1:]),
        opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    onnx.save(model, tmp_path / "relu.onnx")
    with pytest.raises(OptimizationError, match="no scheme could be applied"):
        pipeline.quantize_sweep(tmp_path / "relu.onnx", tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("measured_once")
def test_a_runtime_that_cannot_run_the_parent_is_a_note(digits: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The figures of the other runtime are kept."""
    digits.write(tmp_path)

    class Broken(sweeping.Judge):  # type: ignore[misc]
        def __init__(self, parent: Path, signature: Any, device: Any, *rest: Any, **options: Any) -> None:
            if device.runtime == "openvino":
                raise InferenceError("an operator that it does not know")
            super().__init__(parent, signature, device, *rest, **options)

    real = sweeping.measure

    def measure(candidates: Any, *rest: Any, **options: Any) -> Any:
        return real([c for c in candidates if c.device == "ort:cpu"], *rest, **options)

    monkeypatch.setattr(sweeping, "Judge", Broken)
    monkeypatch.setattr(sweeping, "measure", measure)
    found = pipeline.quantize_sweep(
        tmp_path / "net.onnx", tmp_path / "out", data=tmp_path / "calib.npz", schemes=["fp16"],
        devices=["ort:cpu", "openvino:cpu"], rounds=3, seconds=0.02,
    )  # fmt: skip
    assert [*found.rows[1]["quality"]] == ["ort:cpu"]
    assert "openvino:cpu: nothing ran that is right" in found.data["notes"]
    assert sweeping.table(found)[1][1][-2] == "-"


def test_every_scheme_is_named_in_the_help() -> None:
    from deploykit.cli.quantize_sweep import sweep

    [option] = [p for p in sweep.params if p.name == "schemes"]
    assert all(name in option.help for name in SCHEMES)  # type: ignore[attr-defined]
