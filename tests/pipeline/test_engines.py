"""`quantize static` with NNCF, and with both engines: targets, the choice, and what is written down."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploykit import engines, gating, pipeline, quantizer
from deploykit.data import Dataset
from deploykit.errors import AccuracyError, MissingDependencyError, OptimizationError
from deploykit.optimizers import StaticConfig
from deploykit.progress import Progress
from deploykit.recipe import Recipe
from deploykit.runner import run_recipe
from deploykit.runtimes import require_device

NNCF, BOTH = StaticConfig(engine="nncf"), StaticConfig(engine="both")


def static(folder: Path, config: StaticConfig, **options: Any) -> Any:
    plain = {"min_cosine": 0.5, "gate_seconds": 0, "escalate": False}
    return pipeline.quantize_static(
        folder / "net.onnx", folder / "out", data=folder / "calib.npz", config=config, **(plain | options)
    )


def last(artifact: Any) -> Any:
    return artifact.manifest.lineage[-1]


# --- NNCF alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "kind"), [(2, "weight"), (3, "activation")])
@pytest.mark.parametrize("escalate", [False, True])
def test_targets_keep_the_layer_that_8_bits_destroy(
    digits: Any, tmp_path: Path, layer: int, kind: str, escalate: bool
) -> None:
    digits.write(tmp_path, layer, kind)
    made = static(tmp_path, NNCF, eval_data=tmp_path / "eval.npz", escalate=escalate)
    params = last(made).params
    assert [found["nodes"] for found in params["float_by_target"]] == [[f"layer{layer}"]]
    assert params["float_by_target"][0]["sqnr_db"] < 10
    assert (params["evaluations"], params["ranked_layers"]) == (2, digits.LAYERS)
    assert params["engine"] == "nncf" and last(made).tools["nncf"]
    (record,) = made.manifest.evidence.accuracy
    assert record["certified"] is True and record["value"] >= record["parent"] - 0.01
    for proof in made.manifest.evidence.placement:
        assert proof["layers"]["Gemm"]["int8"] >= digits.LAYERS - 2
        why = {f["name"]: f["why"] for f in proof["float"]}
        assert why[f"layer{layer}"].startswith("chosen by target: SQNR")


def test_a_trained_net_runs_in_integers_in_both_runtimes(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    made = static(tmp_path, NNCF, min_cosine=0.99)
    (record,) = made.manifest.evidence.accuracy
    assert record["agreement"] > 0.98 and record["sqnr_db"] > 25
    for proof in made.manifest.evidence.placement:
        assert proof["layers"] == {"Gemm": {"int8": digits.LAYERS, "total": digits.LAYERS}}


def test_unknown_options_and_a_missing_engine_are_told_first(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptimizationError, match="knows no --equalize"):  # the model is not even there
        static(tmp_path, StaticConfig(engine="nncf", equalize=True))
    digits.write(tmp_path)
    monkeypatch.setitem(sys.modules, "nncf", None)
    for config in (NNCF, BOTH):
        with pytest.raises(MissingDependencyError, match="nncf"):
            static(tmp_path, config)
    assert not (tmp_path / "out").exists()


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the engines' models take given times; the parent takes 10 ms."""

    def take(**ms: tuple[float, float]) -> None:
        def quick_times(paths: list[Path], device: Any, feeds: Any) -> list[float]:
            return [10.0, *(ms[e][0 if device.runtime == "ort" else 1] for e in ("deploykit", "nncf"))]

        monkeypatch.setattr(engines, "quick_times", quick_times)
        monkeypatch.setattr(engines, "quick_ms", lambda *args: 10.0)
        monkeypatch.setattr(quantizer, "slow_layers", lambda *args: [])
        monkeypatch.setattr(
            gating, "time_pair",
            lambda *args: {"verdict": "faster", "ratio": 2, "low": 2, "high": 2, "parent_ms": 2, "ms": 1},
        )  # fmt: skip

    return take


@pytest.mark.parametrize(
    ("ours", "theirs", "kept", "why"),
    [
        ((4, 4), (3, 4), "nncf", "slower than nncf: 0.87x over ort:cpu, openvino:cpu"),
        ((3, 4), (4, 4), "deploykit", "slower than deploykit: 0.87x over ort:cpu, openvino:cpu"),
        ((4, 4), (4, 4), "deploykit", "as fast within 3%, and no closer to the parent (SQNR "),
        ((4, 4), (2, 11), "deploykit", "slower than the parent in openvino:cpu"),
    ],
)
def test_the_faster_one_is_kept_and_the_other_one_is_told(
    digits: Any, tmp_path: Path, times: Any, ours: Any, theirs: Any, kept: str, why: str
) -> None:
    digits.write(tmp_path)
    times(deploykit=ours, nncf=theirs)
    made = static(tmp_path, BOTH, gate_seconds=0.3)
    params, notes = last(made).params, last(made).notes
    assert params["engine"] == kept
    records = {found["engine"]: found for found in params["engines"]}
    lost = records["nncf" if kept == "deploykit" else "deploykit"]
    assert list(records) == ["deploykit", "nncf"]
    assert records[kept]["kept"] is True and "why" not in records[kept]
    assert lost["kept"] is False and lost["why"].startswith(why)
    assert records["deploykit"]["ms"] == {"ort:cpu": ours[0], "openvino:cpu": ours[1]}
    assert all(found["score"]["sqnr_db"] > 20 for found in records.values())
    assert f"engine {kept} is kept" in notes
    assert any(n.startswith(f"engine {lost['engine']} is not: {why}") for n in notes)
    assert ("nncf" in last(made).tools) == (kept == "nncf")


def test_quick_times_leave_out_what_does_not_run(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    feeds = [Dataset.open(tmp_path / "calib.npz").head(1)]
    paths = [tmp_path / "net.onnx", tmp_path / "broken.onnx", tmp_path / "net.onnx"]
    first, broken, third = gating.quick_times(paths, require_device("ort:cpu"), feeds)
    assert broken is None and first and third and 0.1 < first / third < 10


def test_without_time_the_smaller_error_is_kept(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    made = static(tmp_path, BOTH)
    records = {found["engine"]: found for found in last(made).params["engines"]}
    assert all(found["ms"] == {} for found in records.values())
    best = max(records.values(), key=lambda found: found["score"]["sqnr_db"])
    assert best["kept"] and last(made).params["engine"] == best["engine"]
    (record,) = made.manifest.evidence.accuracy
    assert round(record["sqnr_db"], 2) == best["score"]["sqnr_db"]


def test_what_collapses_or_fails_loses_however_fast_it_is(
    digits: Any, tmp_path: Path, times: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits.write(tmp_path, 3, "weight")  # our own engine's defaults destroy it, NNCF's too
    times(deploykit=(1, 1), nncf=(9, 9))
    only = StaticConfig(engine="both", smooth="off")
    real = quantizer.optimize

    def optimize(model: Path, config: Any, *args: Any, **kwargs: Any) -> Any:
        spare = ("layer3",) if config.engine == "nncf" else ()
        return real(model, StaticConfig(engine=config.engine, smooth=config.smooth, exclude=spare), *args, **kwargs)

    monkeypatch.setattr(quantizer, "optimize", optimize)
    made = static(tmp_path, only, gate_seconds=0.3)
    first, second = last(made).params["engines"]
    assert second["kept"] and first["why"].startswith("it collapsed")
    assert any("--smooth: for the engine deploykit only" in note for note in last(made).notes)

    def fail(model: Path, config: Any, *args: Any, **kwargs: Any) -> Any:
        if config.engine == "nncf":
            raise OptimizationError("NNCF failed (it did)")
        return real(model, config, *args, **kwargs)

    monkeypatch.setattr(quantizer, "optimize", fail)
    digits.write(tmp_path)
    made = pipeline.quantize_static(
        tmp_path / "net.onnx", tmp_path / "second", data=tmp_path / "calib.npz", config=BOTH, gate_seconds=0
    )
    assert last(made).params["engines"][1] == {
        "engine": "nncf", "score": None, "ms": {}, "kept": False, "why": "NNCF failed (it did)",
    }  # fmt: skip


def test_too_far_from_the_parent_loses_as_well(
    digits: Any, tmp_path: Path, times: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits.write(tmp_path)
    times(deploykit=(4, 4), nncf=(1, 1))
    answers = iter(["", "cosine 0.5 is below 0.99"])
    monkeypatch.setattr(engines.Distance, "too_far", lambda self, place: next(answers))
    made = static(tmp_path, BOTH, gate_seconds=0.3)
    assert last(made).params["engine"] == "deploykit"
    assert last(made).params["engines"][1]["why"] == "cosine 0.5 is below 0.99"


def test_the_distance_is_that_of_the_comparison_at_the_end(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    made = static(tmp_path, NNCF)
    work = SimpleNamespace(
        parent=SimpleNamespace(path=tmp_path / "net.onnx"), device=require_device("ort:cpu"),
        feeds=[Dataset.open(tmp_path / "calib.npz").head(8)],
    )  # fmt: skip
    assert engines.Distance(work, 0.9).too_far(made.model_path) == ""  # type: ignore[arg-type]
    assert "cosine" in engines.Distance(work, 0.9999999).too_far(made.model_path)  # type: ignore[arg-type]
    assert engines.Distance(work, 0.9).too_far(tmp_path / "nosuch.onnx")  # type: ignore[arg-type]


def test_a_target_that_neither_reaches_writes_nothing(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    with pytest.raises(AccuracyError, match="cannot be met"):
        static(tmp_path, BOTH, min_sqnr=200.0)
    assert not (tmp_path / "out").exists()


def test_calibrations_are_saved_once_by_the_engine_that_can(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    made = static(tmp_path, StaticConfig(engine="both", save_calibration=str(tmp_path / "seen.npz")))
    assert (tmp_path / "seen.npz").is_file()
    assert any("--save-calibration: for the engine deploykit only" in note for note in last(made).notes)


def test_recipes_know_the_engine(digits: Any, tmp_path: Path) -> None:
    digits.write(tmp_path)
    table = {
        "step": "quantize-static", "model": "net.onnx", "data": "calib.npz", "engine": "nncf", "gate_seconds": 0.0,
        "min_cosine": 0.9,
    }  # fmt: skip
    recipe = Recipe.from_tables({"int8": table}, tmp_path)
    made = run_recipe(recipe, tmp_path / "out", resume=False, progress=Progress())
    assert last(made["int8"]).params["engine"] == "nncf"
