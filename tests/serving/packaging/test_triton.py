"""Triton's model repository, read by Triton's own protobuf definitions."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import deserialize_bytes_tensor

import deploykit
from deploykit.errors import DataError, PackageError
from deploykit.runtimes import RuntimeSettings, open_session
from deploykit.serving.package_plan import TargetOptions
from deploykit.serving.protobuf_text import dump

GPU = 1
CPU = 2


def config_of(bundle: Any) -> Any:
    """Triton's own message out of the file."""
    text = (bundle.path / "models" / bundle.manifest.name / "config.pbtxt").read_text(encoding="ascii")
    return text_format.Parse(text, pb.ModelConfig())


def parameters(config: Any) -> dict[str, str]:
    return {k: v.string_value for k, v in config.parameters.items()}


def test_a_model_of_rows(artifact: Any, tmp_path: Path) -> None:
    artifact()
    bundle = deploykit.package(tmp_path / "net", tmp_path / "out", target="triton", max_batch=16)
    config = config_of(bundle)
    assert (config.name, config.backend, config.max_batch_size) == ("net", "onnxruntime", 16)
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("x", pb.TYPE_FP32, [4])]
    assert [(o.name, list(o.dims)) for o in config.output] == [("y", [300]), ("sum", [1])]
    # An output [batch] is one value a row: Triton sends it as [batch, 1].
    assert config.output[1].HasField("reshape") and list(config.output[1].reshape.shape) == []
    assert not config.output[0].HasField("reshape")
    assert bundle.manifest.columns == ["sum"]
    assert [(g.count, g.kind) for g in config.instance_group] == [(1, CPU)]
    assert config.HasField("dynamic_batching")
    assert (tmp_path / "out" / "models" / "net" / "1" / "model.onnx").is_file()
    assert bundle.manifest.replay["verdict"] == "passed"
    assert "--disable-auto-complete-config" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_warm_up_is_a_row_that_the_model_takes(artifact: Any, tmp_path: Path) -> None:
    made = artifact(sizes=(3,))
    bundle = deploykit.package(made.path, tmp_path / "out", target="triton")
    one, largest = config_of(bundle).model_warmup
    assert (one.batch_size, largest.batch_size) == (1, 8)
    entry = one.inputs["x"]
    assert (entry.data_type, list(entry.dims)) == (pb.TYPE_FP32, [4])
    raw = (bundle.path / "models" / "net" / "warmup" / entry.input_data_file).read_bytes()
    assert np.array_equal(np.frombuffer(raw, np.float32), made.golden()[0][0]["x"][0])


def test_strings_warm_up_as_triton_reads_them(artifact: Any, tmp_path: Path) -> None:
    made = artifact("text")
    bundle = deploykit.package(made.path, tmp_path / "out", target="triton", device="ort:cpu")
    config = config_of(bundle)
    assert (config.input[0].data_type, list(config.input[0].dims)) == (pb.TYPE_STRING, [-1])
    entry = config.model_warmup[0].inputs["word"]
    assert list(entry.dims) == [3]
    raw = (bundle.path / "models" / "net" / "warmup" / entry.input_data_file).read_bytes()
    words = [w.decode() for w in deserialize_bytes_tensor(raw)]
    assert words == bundle.golden()[0][0]["word"][0].tolist()


def test_rows_that_depend_on_each_other_are_not_joined(artifact: Any, tmp_path: Path) -> None:
    made = artifact("steps", sizes=(3,))
    bundle = deploykit.package(made.path, tmp_path / "out", target="triton")
    config = config_of(bundle)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [-1, 4]
    assert any("rows depend" in note for note in bundle.manifest.notes)
    with pytest.raises(PackageError, match="requests cannot be joined"):
        deploykit.package(made.path, tmp_path / "again", target="triton", max_batch=4)
    assert not (tmp_path / "again").exists()


def test_a_fixed_batch_is_a_dimension_like_others(artifact: Any, tmp_path: Path) -> None:
    bundle = deploykit.package(artifact("fixed").path, tmp_path / "out", target="triton")
    config = config_of(bundle)
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [2, 4]
    assert list(config.model_warmup[0].inputs["x"].dims) == [2, 4]


def test_scalars_are_refused(artifact: Any, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"'factor' is a scalar.*dimension of size 1"):
        deploykit.package(artifact("scalar").path, tmp_path / "out", target="triton")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net"]


def test_external_data_make_the_model_a_directory(artifact: Any, tmp_path: Path) -> None:
    made = artifact(external=True)
    bundle = deploykit.package(made.path, tmp_path / "out", target="triton")
    folder = bundle.path / "models" / "net" / "1" / "model.onnx"
    assert bundle.model_path == folder / "model.onnx"
    assert (folder / "weights" / "model.data").is_file()
    assert onnx.load(str(bundle.model_path)).graph.initializer[0].raw_data
    assert deploykit.smoke(bundle.path)["passed"]


def test_tuned_settings_reach_the_server(artifact: Any, tmp_path: Path) -> None:
    tuned = RuntimeSettings(
        "ort:cpu", threads=3, sessions=4, concurrency=4, batch=8, optimize="extended",
        settings={"session.intra_op.allow_spinning": "0"},
    )  # fmt: skip
    tuned.save(tmp_path / "tuned.json")
    bundle = deploykit.package(
        artifact().path, tmp_path / "out", target="triton", settings=tmp_path / "tuned.json",
        options=TargetOptions(max_delay_ms=2.5),
    )  # fmt: skip
    config = config_of(bundle)
    assert parameters(config) == {"intra_op_thread_count": "3", "execution_mode": "0"}
    assert config.instance_group[0].count == 4
    assert config.optimization.graph.level == 1
    assert config.dynamic_batching.max_queue_delay_microseconds == 2500
    assert list(config.dynamic_batching.preferred_batch_size) == [8]
    # What the backend cannot take is said, and not dropped in silence.
    assert any("allow_spinning" in note for note in bundle.manifest.notes)
    assert "allow_spinning" in (bundle.path / "README.md").read_text(encoding="utf-8")


def test_parallel_execution_and_levels(artifact: Any, tmp_path: Path) -> None:
    RuntimeSettings(
        "ort:cpu", threads=2, optimize="basic", settings={"execution_mode": "parallel", "inter_op_num_threads": 2}
    ).save(tmp_path / "tuned.json")
    bundle = deploykit.package(artifact().path, tmp_path / "out", target="triton", settings=tmp_path / "tuned.json")
    config = config_of(bundle)
    assert parameters(config) == {"intra_op_thread_count": "2", "execution_mode": "1", "inter_op_thread_count": "2"}
    assert config.optimization.graph.level == -1


def test_the_openvino_backend_gets_ir(artifact: Any, tmp_path: Path) -> None:
    RuntimeSettings("openvino:cpu", threads=1, settings={"NUM_STREAMS": 2}).save(tmp_path / "tuned.json")
    bundle = deploykit.package(artifact().path, tmp_path / "out", target="triton", settings=tmp_path / "tuned.json")
    config = config_of(bundle)
    assert config.backend == "openvino"
    assert parameters(config) == {"NUM_STREAMS": "2", "INFERENCE_NUM_THREADS": "2"}
    assert config.instance_group[0].count == 2
    assert sorted(p.name for p in (bundle.path / "models" / "net" / "1").iterdir()) == ["model.bin", "model.xml"]
    with open_session(bundle.model_path, "openvino:cpu") as session:
        assert {s.name for s in session.signature.outputs} == {"y", "sum"}
    assert any("AMX" in note for note in bundle.manifest.notes)


@pytest.mark.parametrize(
    ("device", "name", "options"),
    [
        ("ort:cuda", "cuda", {"use_tf32": "0"}),
        ("ort:tensorrt", "tensorrt", {"precision_mode": "FP32"}),
    ],
)
def test_accelerators(artifact: Any, tmp_path: Path, device: str, name: str, options: dict[str, str]) -> None:
    """Nothing of this hardware is here: that the golden requests were not replayed is said."""
    bundle = deploykit.package(artifact().path, tmp_path / "out", target="triton", device=device)
    config = config_of(bundle)
    assert config.instance_group[0].kind == GPU
    (found,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (found.name, dict(found.parameters)) == (name, options)
    assert bundle.manifest.replay["verdict"] == "not run"
    assert any("not replayed here" in note for note in bundle.manifest.notes)


def test_settings_for_another_device_are_refused_where_they_were_named(artifact: Any, tmp_path: Path) -> None:
    RuntimeSettings("torch:cpu").save(tmp_path / "torch.json")
    made = artifact(settings=RuntimeSettings("torch:cpu"))
    with pytest.raises(PackageError, match="is for torch:cpu"):
        deploykit.package(made.path, tmp_path / "out", target="triton", settings=tmp_path / "torch.json")
    # The artifact's own are only a suggestion.
    bundle = deploykit.package(made.path, tmp_path / "out", target="triton")
    assert any("own settings are for torch:cpu" in note for note in bundle.manifest.notes)


def test_settings_that_cannot_be_read(artifact: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as tuned settings"):
        deploykit.package(artifact().path, tmp_path / "out", target="triton", settings=tmp_path / "bad.json")


def test_any_text_survives_the_text_format() -> None:
    text = 'a "quoted" \\ back\nslash\t é \x00 \x7f ☃'
    message = {"name": text, "max_batch_size": -3, "parameters": [{"key": text, "value": {"string_value": ""}}]}
    found = text_format.Parse(dump(message), pb.ModelConfig())
    assert found.name == text
    assert found.max_batch_size == -3
    assert list(found.parameters) == [text]


def test_a_row_of_strings_has_lengths_of_four_bytes() -> None:
    from deploykit.serving.smoke_http import pack

    assert pack(np.array(["é", ""])) == struct.pack("<I", 2) + "é".encode() + struct.pack("<I", 0)
