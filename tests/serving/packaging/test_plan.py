"""What every bundle is made from: settings, contracts, and whether rows may be joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deploykit
from deploykit.artifact import Artifact
from deploykit.errors import MissingDependencyError, PackageError
from deploykit.runtimes import RuntimeSettings, open_session
from deploykit.serving import package_plan as planning
from deploykit.serving.package_targets import TARGETS, find_target
from deploykit.specs import TensorSpec


def spec(name: str, *shape: Any) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


@pytest.mark.parametrize(
    ("inputs", "outputs", "symbol", "why"),
    [
        ([spec("x", "n", 4)], [spec("y", "n")], "n", ""),
        ([spec("x", 4)], [spec("y", 4)], None, "fixed"),
        ([spec("x")], [spec("y", "n")], None, "no rows"),
        ([], [spec("y", "n")], None, "no rows"),
        ([spec("x", "n", 4), spec("z", 4)], [spec("y", "n")], None, "'n'"),
        ([spec("x", "n", 4)], [spec("y", "m")], None, "'n'"),
        ([spec("x", "n", 4)], [spec("y")], None, "'n'"),
        ([spec("x", "n", "n")], [spec("y", "n")], None, "twice"),
    ],
)
def test_the_dimension_of_rows(inputs: Any, outputs: Any, symbol: str | None, why: str) -> None:
    found, reason = planning.batch_symbol(inputs, outputs)
    assert found == symbol
    assert why in reason


@pytest.mark.parametrize("sizes", [(1,), (1, 2), (3,)])
@pytest.mark.parametrize(
    ("kind", "joined"), [("rows", True), ("text", True), ("steps", False), ("centred", False), ("dynamic", False)]
)
def test_rows_are_joined_where_they_do_not_see_each_other(
    artifact: Any, kind: str, joined: bool, sizes: tuple[int, ...]
) -> None:
    made = artifact(kind, sizes=sizes)
    with open_session(made, "ort:cpu") as session:
        # What a lossy model may be off by does not let through what rows do to each other.
        for min_cosine in (None, 0.5):
            why = planning.why_not_joined(session, planning.golden_cases(made), min_cosine)
            assert (why is None) == joined, why


def test_operators_that_see_all_rows_are_named(artifact: Any, tmp_path: Path) -> None:
    made = artifact("dynamic", step="quantize_dynamic")
    bundle = deploykit.package(made.path, tmp_path / "out", target="triton")
    assert bundle.manifest.max_batch == 0
    assert any("DynamicQuantizeLinear takes one scale from all rows" in note for note in bundle.manifest.notes)


def test_equal_requests_show_nothing(artifact: Any, tmp_path: Path) -> None:
    made = artifact("text", sizes=(1,))
    cases = [({"word": np.array([["a", "zz", "a"]])}, o) for _, o in planning.golden_cases(made)]
    with open_session(made, "ort:cpu") as session:
        why = planning.why_not_joined(session, cases, None)
    assert why is not None
    assert "no two requests" in why


def test_where_no_runtime_could_show_it_nothing_is_joined(
    artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact()
    monkeypatch.setattr(planning, "default_devices", tuple)

    def missing(*_: Any, **__: Any) -> Any:
        raise MissingDependencyError("onnxruntime is not installed")

    monkeypatch.setattr(planning, "open_session", missing)
    bundle = deploykit.package(made.path, tmp_path / "out", target="triton")
    assert bundle.manifest.max_batch == 0
    assert any("no runtime is installed" in note for note in bundle.manifest.notes)
    assert bundle.manifest.replay["verdict"] == "not run"


def test_the_limit_is_that_of_the_settings_or_the_user(artifact: Any, tmp_path: Path) -> None:
    made = artifact(sizes=(2, 3))
    for number, (batch, asked, limit) in enumerate([(1, None, 8), (32, None, 32), (32, 4, 4), (1, 0, 0)]):
        file = tmp_path / f"{number}.json"
        RuntimeSettings("ort:cpu", batch=batch).save(file)
        bundle = deploykit.package(made.path, tmp_path / str(number), target="triton", settings=file, max_batch=asked)
        assert bundle.manifest.max_batch == limit
    with pytest.raises(PackageError, match=r"smallest golden request has 2 rows; give --max-batch 2"):
        deploykit.package(made.path, tmp_path / "out", target="triton", max_batch=1)
    # Requests of more rows than the server takes would be refused: they are no golden ones of this bundle.
    assert len(deploykit.package(made.path, tmp_path / "two", target="triton", max_batch=2).golden()) == 1


def test_an_artifact_of_its_own_settings(artifact: Any, tmp_path: Path) -> None:
    made = artifact(settings=RuntimeSettings("openvino:cpu", threads=1))
    bundle = deploykit.package(made.path, tmp_path / "out", target="triton")
    assert bundle.settings.device == "openvino:cpu"
    other = deploykit.package(made.path, tmp_path / "two", target="triton", device="ort:cpu")
    assert other.settings.device == "ort:cpu"
    assert any("own settings are for openvino:cpu" in note for note in other.manifest.notes)


def test_settings_of_another_model_are_noted(artifact: Any, tmp_path: Path) -> None:
    RuntimeSettings("ort:cpu", model_sha256="0" * 64).save(tmp_path / "t.json")
    bundle = deploykit.package(artifact().path, tmp_path / "out", target="triton", settings=tmp_path / "t.json")
    assert any("tuned for the model 000000000000" in note for note in bundle.manifest.notes)


@pytest.mark.parametrize("target", ["triton", "kserve", "ovms", "bentoml"])
def test_an_artifact_that_holds_ir(artifact: Any, tmp_path: Path, target: str) -> None:
    bundle = deploykit.package(artifact(ir=True).path, tmp_path / "out", target=target)
    assert bundle.settings.device == "openvino:cpu"
    assert bundle.model_path.name == "model.xml"
    assert deploykit.smoke(bundle.path)["passed"]


def test_ir_is_nothing_for_mlflow(artifact: Any, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"MLflow does not read model\.xml"):
        deploykit.package(artifact(ir=True).path, tmp_path / "out", target="mlflow")


def test_a_device_that_does_not_read_the_model(artifact: Any, tmp_path: Path) -> None:
    made = artifact(ir=True)
    with pytest.raises(PackageError, match=r"ort:cpu does not read model\.xml"):
        deploykit.package(made.path, tmp_path / "out", target="triton", device="ort:cpu")
    RuntimeSettings("ort:cpu").save(tmp_path / "t.json")
    with pytest.raises(PackageError, match=r"ort:cpu does not read model\.xml"):
        deploykit.package(made.path, tmp_path / "out", target="triton", settings=tmp_path / "t.json")


def test_golden_requests_are_needed(artifact: Any, tmp_path: Path) -> None:
    made = artifact()
    manifest = json.loads((made.path / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"]["golden.npz"]
    (made.path / "golden.npz").unlink()
    (made.path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(PackageError, match="no golden requests"):
        deploykit.package(made.path, tmp_path / "out", target="triton")


@pytest.mark.parametrize("lost", ["y", "sum"])
def test_golden_requests_have_every_output(artifact: Any, tmp_path: Path, lost: str) -> None:
    made = artifact(change=lambda outputs: {n: a for n, a in outputs.items() if n != lost})
    with pytest.raises(PackageError, match=f"have no output '{lost}'"):
        deploykit.package(made.path, tmp_path / "out", target="triton")


def test_what_optimize_wrote_stands_for_its_winner(artifact: Any, tmp_path: Path) -> None:
    made = artifact(name="best/front/a")
    (tmp_path / "best" / "optimize.json").write_text(json.dumps({"winner": "front/a"}), encoding="utf-8")
    bundle = deploykit.package(tmp_path / "best", tmp_path / "out", target="triton")
    assert (bundle.manifest.name, bundle.manifest.artifact) == ("best", made.digest)


def test_outputs_that_prove_nothing_are_packaged_only_where_that_was_accepted(artifact: Any, tmp_path: Path) -> None:
    made = artifact(change=lambda outputs: {n: np.zeros_like(a) for n, a in outputs.items()})
    assert not planning.contract_of(Artifact.open(made.path)).unverifiable
    with pytest.raises(PackageError, match="golden requests"):
        deploykit.package(made.path, tmp_path / "out", target="triton")


def test_targets_by_name() -> None:
    assert sorted(TARGETS) == ["bentoml", "docker", "kserve", "mlflow", "ovms", "triton"]
    with pytest.raises(PackageError, match="unknown target 'torchserve'"):
        find_target("torchserve")
