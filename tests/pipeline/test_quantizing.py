"""Quantization under an accuracy target and a speed gate: what is chosen, refused, and written down."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploykit import gating, optimizers, pipeline, quantizer
from deploykit.errors import AccuracyError, DataError, ParityError, SpeedError
from deploykit.gating import SlowLayer
from deploykit.optimizers import DynamicConfig, StaticConfig

# Smoothing and rounding rescue some of the spoiled layers; tests of the choice of layers go without.
OLD = {"min_cosine": 0.5, "escalate": False}


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process, in the folder of the test."""
    from deploykit.cli import main

    def run(*args: str) -> Any:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        printed = capfd.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=printed.out, stderr=printed.err)

    return run


def static(folder: Path, **options: Any) -> Any:
    return pipeline.quantize_static(folder / "net.onnx", folder / "out", data=folder / "calib.npz", **(OLD | options))


def last(artifact: Any) -> Any:
    return artifact.manifest.lineage[-1]


def nothing_written(folder: Path) -> bool:
    return not list(folder.glob("*out*"))


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "kind"), [(1, "weight"), (3, "weight"), (2, "activation"), (4, "activation")])
def test_exactly_the_layer_that_8_bits_destroy_stays_in_float(
    digits: Any, tmp_path: Path, layer: int, kind: str
) -> None:
    digits.write(tmp_path, layer, kind)
    made = static(tmp_path, eval_data=tmp_path / "eval.npz", metric="accuracy", max_drop=0.01)
    params = last(made).params
    assert [found["nodes"] for found in params["float_by_target"]] == [[f"layer{layer}"]]
    assert params["float_by_target"][0]["sqnr_db"] < 10
    assert params["evaluations"] == 2 and params["ranked_layers"] == digits.LAYERS
    assert any(n.startswith(f"layer{layer} stays in float, chosen by target: SQNR") for n in last(made).notes)

    (record,) = made.manifest.evidence.accuracy
    assert record["certified"] is True and record["metric"] == "accuracy" and record["samples"] == 597
    assert record["parent"] > 0.85 and record["value"] >= record["parent"] - 0.01
    for proof in made.manifest.evidence.placement:
        assert proof["layers"]["Gemm"]["total"] == digits.LAYERS
        assert proof["layers"]["Gemm"]["int8"] >= digits.LAYERS - 2
        why = {f["name"]: f["why"] for f in proof["float"]}
        assert why[f"layer{layer}"].startswith("chosen by target: SQNR")


def test_without_labels_the_parent_is_the_measure(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path, 2, "weight")
    made = static(tmp_path, min_sqnr=25.0, min_agreement=0.95)
    assert [f["nodes"] for f in last(made).params["float_by_target"]] == [["layer2"]]
    assert any("flatters" in note for note in last(made).notes)
    (record,) = made.manifest.evidence.accuracy
    assert record["sqnr_db"] >= 25 and record["agreement"] >= 0.95 and record["certified"] is True


def test_dynamic_quantization_has_targets_too(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path, 3, "weight")
    model = tmp_path / "net.onnx"
    made = pipeline.quantize_dynamic(model, tmp_path / "out", eval_data=tmp_path / "eval.npz", **OLD)
    assert [f["nodes"] for f in last(made).params["float_by_target"]] == [["layer3"]]


def test_a_target_that_is_met_at_once_costs_one_evaluation(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    params = last(static(tmp_path, eval_data=tmp_path / "eval.npz")).params
    assert (params["evaluations"], params["float_by_target"]) == (1, [])


def test_a_target_out_of_reach_writes_nothing(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    with pytest.raises(AccuracyError, match=r"cannot be met: SQNR .* models judged"):
        static(tmp_path, min_sqnr=200.0)
    assert nothing_written(tmp_path)


def test_settings_are_escalated_before_layers_go_back_to_float(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits.write(tmp_path)
    given = []

    def escalation(model: Path, config: StaticConfig) -> Any:
        given.append(config)
        yield config
        yield StaticConfig(exclude=("layer4",))

    monkeypatch.setattr(optimizers, "escalation", escalation, raising=False)
    plain = static(tmp_path, min_sqnr=-50.0, escalate=True)
    reached = last(plain).params
    assert (reached["evaluations"], reached["exclude"], given) == (1, [], [])
    sqnr = plain.manifest.evidence.accuracy[0]["sqnr_db"]
    made = pipeline.quantize_static(
        tmp_path / "net.onnx", tmp_path / "second", data=tmp_path / "calib.npz", min_sqnr=sqnr + 0.01
    )
    assert (last(made).params["evaluations"], last(made).params["exclude"]) == (2, ["layer4"])
    assert last(made).params["float_by_target"] == []


def test_a_spoiled_layer_is_rescued_by_settings_or_left_out(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path, 3, "weight")
    made = static(tmp_path, eval_data=tmp_path / "eval.npz", escalate=True, min_cosine=0.9)
    (record,) = made.manifest.evidence.accuracy
    assert record["certified"] is True and record["value"] >= record["parent"] - 0.01
    params = last(made).params
    assert params["evaluations"] >= 2 and len(params["float_by_target"]) <= 1
    assert params["float_by_target"] or params["calibration"] == "auto"


def test_one_scale_a_tensor_is_escalated_to_one_a_channel() -> None:
    configs = list(quantizer.escalate(Path("m"), DynamicConfig(per_channel=False)))
    assert [c.per_channel for c in configs] == [False, True]
    assert len(list(quantizer.escalate(Path("m"), DynamicConfig()))) == 1


def test_a_collapsed_model_does_not_pass_without_any_target(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path, 1, "weight")
    with pytest.raises(AccuracyError, match="collapsed"):
        static(tmp_path, min_cosine=-1.0)
    assert nothing_written(tmp_path)
    with pytest.raises(ParityError):
        static(tmp_path, min_cosine=0.95)


def test_made_up_inputs_certify_nothing(digits: Any, tmp_path: Path, cli: Any) -> None:
    model = digits.write(tmp_path)
    made = pipeline.quantize_dynamic(model, tmp_path / "out")
    assert made.manifest.evidence.accuracy == [{"certified": False, "summary": "not certified: made-up inputs"}]
    assert any("not certified: made-up inputs" in note for note in last(made).notes)
    shown = cli("inspect", "-m", str(made.path)).stdout
    assert "not certified: made-up inputs" in shown and "Gemm int8" in shown
    with pytest.raises(DataError, match="real data"):
        pipeline.quantize_dynamic(model, tmp_path / "second", min_sqnr=10.0)


def test_real_data_without_a_target_are_no_certificate(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    (record,) = static(tmp_path).manifest.evidence.accuracy
    assert record["certified"] is False and "no accuracy target" in record["summary"] and record["agreement"] > 0.9


# --- speed -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Quantize with verdicts that are given, by device."""

    def run(verdicts: dict[str, str], **options: Any) -> Any:
        def time_pair(parent: Any, model: Any, feeds: Any, settings: Any) -> dict[str, Any]:
            assert parent.device == model.device and parent.path != model.path
            ratio = {"faster": 2.0, "tie": 1.0, "slower": 0.5}[verdicts[model.device]]
            known = {"ratio": ratio, "low": ratio, "high": ratio, "parent_ms": 1.0, "ms": 1 / ratio}
            return {"verdict": verdicts[model.device], **known}

        digits.write(tmp_path)
        monkeypatch.setattr(gating, "SMALLEST_MS", 0.0)
        monkeypatch.setattr(gating, "time_pair", time_pair)
        return static(tmp_path, **options)

    return run


@pytest.mark.parametrize("other", ["faster", "tie"])
def test_faster_somewhere_and_slower_nowhere(timed: Any, other: str) -> None:
    made = timed({"ort:cpu": "faster", "openvino:cpu": other})
    assert [r["verdict"] for r in made.manifest.evidence.benchmark] == ["faster", other]
    assert made.manifest.evidence.benchmark[0]["summary"] == "faster 2.00x [2.00, 2.00], 1.000 -> 0.500 ms"


@pytest.mark.parametrize(
    ("ort", "openvino", "text"),
    [
        ("faster", "slower", "slower than its parent: .*openvino:cpu slower 0.50x.*--device ort:cpu.*--allow-slower"),
        ("tie", "tie", "not faster than its parent: ort:cpu tie 1.00x"),
        ("slower", "tie", "slower than its parent"),
    ],
)
def test_slower_or_not_faster_is_refused_with_the_figures(
    timed: Any, tmp_path: Path, ort: str, openvino: str, text: str
) -> None:
    verdicts = {"ort:cpu": ort, "openvino:cpu": openvino}
    with pytest.raises(SpeedError, match=text):
        timed(verdicts)
    assert nothing_written(tmp_path)
    made = timed(verdicts, allow_slower=True)
    assert [r["verdict"] for r in made.manifest.evidence.benchmark] == [ort, openvino]
    assert any(n.startswith("allowed, though it is") for n in last(made).notes)


def test_noise_gets_more_rounds_before_it_is_called_a_tie(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = []

    def time_pair(parent: Any, model: Any, feeds: Any, settings: Any) -> dict[str, Any]:
        rounds.append(settings.rounds)
        verdict = "tie" if len(rounds) == 1 else "faster"
        return {"verdict": verdict, "ratio": 2.0, "low": 0.9, "high": 4.0, "parent_ms": 1.0, "ms": 0.5}

    digits.write(tmp_path)
    monkeypatch.setattr(gating, "SMALLEST_MS", 0.0)
    monkeypatch.setattr(gating, "time_pair", time_pair)
    made = static(tmp_path, devices=["ort:cpu"])
    assert made.manifest.evidence.benchmark[0]["verdict"] == "faster"
    assert rounds == [3, 9]


def test_only_the_named_device_decides(timed: Any) -> None:
    made = timed({"ort:cpu": "faster"}, devices=["ort:cpu"])
    assert [r["device"] for r in made.manifest.evidence.benchmark] == ["ort:cpu"]
    assert [r["device"] for r in made.manifest.evidence.placement] == ["ort:cpu"]


def test_small_models_and_no_seconds_are_not_timed(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gating, "SMALLEST_MS", 1e6)
    digits.write(tmp_path)
    made = static(tmp_path)
    for record in made.manifest.evidence.benchmark:
        assert record["verdict"] == "not timed" and "too small" in record["summary"]
    made = pipeline.quantize_static(
        tmp_path / "net.onnx", tmp_path / "second", data=tmp_path / "calib.npz", gate_seconds=0
    )
    assert all("--gate-seconds 0" in r["summary"] for r in made.manifest.evidence.benchmark)


def test_what_something_else_judges_is_not_judged(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    given: dict[str, Any] = {"data": tmp_path / "calib.npz", "gate_seconds": 0}
    judged = pipeline.quantize_static(tmp_path / "net.onnx", tmp_path / "judged", **given, check_rows=16)
    assert judged.manifest.evidence.accuracy[0]["samples"] == 16
    left = pipeline.quantize_static(tmp_path / "net.onnx", tmp_path / "left", **given, check_rows=0)
    assert left.manifest.evidence.accuracy == [{"certified": False, "summary": "not certified: not judged"}]
    held = pipeline.quantize_static(tmp_path / "net.onnx", tmp_path / "held", **given, check_rows=0, min_sqnr=5.0)
    assert held.manifest.evidence.accuracy[0]["certified"]


def test_a_device_that_cannot_run_it_counts_where_it_was_named() -> None:
    records = [
        {"device": "ort:cpu", "verdict": "faster", "ratio": 2.0, "summary": "faster"},
        {"device": "openvino:cpu", "verdict": "failed", "reason": "no", "summary": "failed: no"},
    ]
    assert gating.check_speed(records, gating.Gate(())) == ""
    with pytest.raises(SpeedError, match="openvino:cpu failed: no"):
        gating.check_speed(records, gating.Gate((), named=True))


def test_the_first_device_decides_alone_where_it_should() -> None:
    records = [
        {"device": "ort:cpu", "verdict": "faster", "ratio": 2.0, "summary": "faster 2x"},
        {"device": "openvino:cpu", "verdict": "slower", "ratio": 0.8, "summary": "slower 0.8x"},
    ]
    assert gating.check_speed(records, gating.Gate((), first_only=True)) == ""
    for gate in (gating.Gate(()), gating.Gate((), named=True, first_only=True)):
        with pytest.raises(SpeedError, match="openvino:cpu slower"):
            gating.check_speed(records, gate)
    with pytest.raises(SpeedError, match="ort:cpu slower"):
        gating.check_speed([records[0] | {"verdict": "slower", "summary": "slower"}], gating.Gate((), first_only=True))


def test_it_is_really_timed_in_fresh_processes(digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gating, "SMALLEST_MS", 0.0)
    digits.write(tmp_path)
    made = static(tmp_path, devices=["ort:cpu"], allow_slower=True, gate_seconds=0.3)
    (record,) = made.manifest.evidence.benchmark
    assert record["verdict"] in ("faster", "slower", "tie") and record["rounds"] == 3
    assert record["ms"] > 0 and record["parent_ms"] > 0 and record["low"] <= record["ratio"] <= record["high"]


# --- layers that int8 slows down -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gains", "given"), [([True, True], ["layer1", "layer3"]), ([True, False], ["layer1"])])
def test_slow_layers_return_to_float_while_the_whole_gains(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gains: list[bool], given: list[str]
) -> None:
    digits.write(tmp_path)
    rounds = iter([[SlowLayer("layer1", 10, 20)], [SlowLayer("layer3", 10, 30)], [SlowLayer("layer4", 1, 2)]])
    answers = iter(gains)
    monkeypatch.setattr(quantizer, "SMALLEST_MS", 0.0)
    monkeypatch.setattr(quantizer, "slow_layers", lambda *args: next(rounds))
    monkeypatch.setattr(quantizer, "faster_as_a_whole", lambda *args: next(answers))
    made = static(tmp_path)
    assert last(made).params["float_because_slower"] == given
    assert last(made).params["exclude"] == given
    why = {f["name"]: f["why"] for f in made.manifest.evidence.placement[0]["float"]}
    assert why["layer1"] == "slower: int8 20 us, float 10 us"
    assert len(list(rounds)) == 1  # two rounds, never three


def test_slow_means_much_slower_and_of_weight(digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits.write(tmp_path)
    made = static(tmp_path)
    floats = {"layer0": 1000.0, "layer1": 100.0, "layer2": 100.0, "layer3": 1.0}
    first = {"layer0": 1300.0, "layer1": 110.0, "layer2": 200.0, "layer3": 10.0, "layer4": 5.0}
    times = iter([floats, first, floats, first | {"layer0": 900.0, "layer2": 210.0}])
    monkeypatch.setattr(gating, "_kernel_times", lambda *args: next(times))
    found = gating.slow_layers(tmp_path / "net.onnx", made.model_path, None, {})
    assert found == [SlowLayer("layer2", 100.0, 210.0)]


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_and_its_recipe(digits: Any, tmp_path: Path, cli: Any) -> None:
    digits.write(tmp_path, 3, "weight")
    command = [
        "quantize", "static", "-m", "net.onnx", "--data", "calib.npz", "--eval", "eval.npz", "--metric", "f1",
        "--max-drop", "1%", "--min-cosine", "0.5", "--device", "ort:cpu", "--gate-seconds", "0", "--no-escalation",
    ]  # fmt: skip
    done = cli(*command, "-o", "a")
    assert done.returncode == 0, done.stderr
    assert "quality certified: f1 down by at most 0.01 of the parent's; f1 0." in done.stdout
    assert "layer3 (chosen by target: SQNR" in done.stdout and "not timed: --gate-seconds 0" in done.stdout
    shown = cli("inspect", "-m", "a").stdout
    assert "certified: f1" in shown and "layer3 (chosen by target: SQNR" in shown

    dry = cli(*command, "-o", "b", "--dry-run")
    (tmp_path / "recipe.toml").write_text(dry.stdout)
    done = cli("run", "recipe.toml", "-o", "b")
    assert done.returncode == 0, done.stderr
    manifests = [json.loads(f.read_text()) for f in (tmp_path / "a/manifest.json", *tmp_path.glob("b/*/manifest.json"))]
    assert len(manifests) == 2
    first, second = (m["evidence"]["accuracy"][0] for m in manifests)
    assert {k: v for k, v in first.items() if k not in ("summary", "data")} == {
        k: v for k, v in second.items() if k not in ("summary", "data")
    }

    hopeless = ["--min-sqnr", "200", "--no-escalation"]
    done = cli("quantize", "static", "-m", "net.onnx", "--data", "calib.npz", *hopeless, "-o", "c")
    assert done.returncode == 1 and "cannot be met" in done.stderr and "Traceback" not in done.stderr
    np.savez(tmp_path / "bare.npz", x=np.load(tmp_path / "eval.npz")["x"])
    done = cli("quantize", "static", "-m", "net.onnx", "--data", "calib.npz", "--eval", "bare.npz", "-o", "c")
    assert done.returncode == 1 and "--min-sqnr DB or --min-agreement SHARE" in done.stderr
    assert not (tmp_path / "c").exists()
