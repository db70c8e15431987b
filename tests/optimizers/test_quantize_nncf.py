"""NNCF as an engine of static quantization."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.data import Dataset
from deploykit.errors import DataError, MissingDependencyError, OptimizationError
from deploykit.optimizers import StaticConfig, escalation, optimize
from deploykit.progress import Progress
from deploykit.proof import layers_of, runs_in_integers
from deploykit.runtimes import open_session

ROOT = Path(__file__).parents[2]
NNCF = StaticConfig(engine="nncf")


def integers(path: Path, device: str) -> dict[str, bool]:
    """By layer, whether it runs in integers."""
    with open_session(path, device) as session:
        executed = session.executed()
    return {layer.name: runs_in_integers(layer, executed) for layer in layers_of(onnx.load(path))}


def wide_net(path: Path) -> Path:
    """Two products over a free number of steps."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(0, 0.1, (32, 32)).astype(np.float32), n) for n in ("w0", "w1")]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w1"], ["y"], name="second"),
    ]
    shape = ["batch", "steps", 32]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)], weights,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    return wide_net(tmp_path / "wide.onnx")


def run_nncf(model: Path, target: Path, data: Dataset, config: StaticConfig = NNCF, **options: Any) -> Any:
    def run(path: Path) -> Any:
        return open_session(path, threads=1).run

    return optimize(model, config, target, check=lambda path: None, open_model=run, data=data, **options)


def noise(rows: int = 12, steps: int = 5) -> dict[str, Any]:
    return {"x": np.random.default_rng(1).normal(size=(rows, steps, 32)).astype(np.float32)}


# --- real weights ----------------------------------------------------------------------------------------------------


def test_a_trained_net_keeps_its_accuracy_and_runs_in_integers_in_both(digits: Any, tools: Any, tmp_path: Path) -> None:
    made, result = tools.quantized(digits.path, tmp_path, NNCF, digits.calibration)
    assert digits.accuracy(made) >= digits.accuracy(digits.path) - 0.02
    for device in ("ort:cpu", "openvino:cpu"):
        found = integers(made, device)
        assert len(found) == 8 and all(found.values()), (device, found)
    stored = {t.name: t.data_type for t in onnx.load(made).graph.initializer}
    nodes = onnx.load(made).graph.node
    assert {stored[n.input[2]] for n in nodes if n.op_type == "QuantizeLinear"} == {TensorProto.UINT8}
    assert result.params["engine"] == "nncf" and result.params["samples"] == 512 and result.params["batches"] == 64
    assert result.params["quantized_nodes"] >= 8
    assert result.tools.keys() == {"onnxruntime", "onnx", "nncf"}
    assert not [note for note in result.notes if "bits" in note and "this CPU has no VNNI" not in note]


def test_what_is_excluded_stays_in_float_in_both(digits: Any, tools: Any, tmp_path: Path) -> None:
    names = [n.name for n in onnx.load(digits.path).graph.node if n.op_type == "Conv"]
    config = StaticConfig(engine="nncf", exclude=(names[3],))
    made, result = tools.quantized(digits.path, tmp_path, config, digits.calibration)
    assert result.params["exclude"] == [names[3]]
    for device in ("ort:cpu", "openvino:cpu"):
        assert [n for n, found in integers(made, device).items() if not found] == [names[3]]
    # NNCF gives the convolution before it no range for its output; ONNX Runtime wants one.
    assert result.params["outputs_quantized"] == 1
    assert digits.accuracy(made) >= digits.accuracy(digits.path) - 0.02
    config = StaticConfig(engine="nncf", exclude=("Conv",))
    made, _ = tools.quantized(digits.path, tmp_path, config, digits.calibration)
    for device in ("ort:cpu", "openvino:cpu"):
        assert [n for n, found in integers(made, device).items() if found] == ["/22/Gemm"]


@pytest.mark.parametrize(("bits", "least", "most"), [("7", 60, 64), ("8", 127, 128)])
def test_bits_of_weights(digits: Any, tools: Any, tmp_path: Path, bits: str, least: int, most: int) -> None:
    made, result = tools.quantized(
        digits.path, tmp_path, StaticConfig(engine="nncf", weight_bits=bits), digits.calibration
    )
    codes = [numpy_helper.to_array(t) for t in onnx.load(made).graph.initializer if t.data_type == TensorProto.INT8]
    # Depthwise convolutions keep 8 bits: NNCF knows that their products are not summed in 16.
    weights = [c for c in codes if c.ndim == 2 or (c.ndim == 4 and (c.shape[1] > 1 or c.shape[0] == 16))]
    assert len(weights) == 6 and result.params["weight_bits"] == int(bits)
    assert all(least <= np.abs(c.astype(int)).max() <= most for c in weights)


def test_one_scale_a_tensor(wide: Path, tmp_path: Path) -> None:
    for per_channel, size in ((True, 32), (False, 1)):
        target = tmp_path / f"{size}.onnx"
        config = StaticConfig(engine="nncf", per_channel=per_channel)
        result = run_nncf(wide, target, Dataset.from_arrays(noise()), config)
        graph = onnx.load(target).graph
        stored = {t.name: t for t in graph.initializer}
        readers = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
        assert [np.prod(stored[n.input[1]].dims, dtype=int) for n in readers] == [size, size]
        assert result.params["per_channel"] is per_channel


def test_layers_line_up_with_the_float_graph(digits: Any, tools: Any, tmp_path: Path) -> None:
    data = Dataset.from_arrays(digits.calibration)
    result = run_nncf(digits.path, tmp_path / "q.onnx", data, keep_float=tmp_path / "float.onnx")
    floats = {o for n in onnx.load(tmp_path / "float.onnx").graph.node for o in n.output}
    layered = onnx.load(result.layered).graph.node
    assert floats <= {o for n in layered for o in n.output}
    want = tools.outputs_of(digits.path, digits.test)
    np.testing.assert_allclose(tools.outputs_of(tmp_path / "float.onnx", digits.test), want, atol=1e-3)
    assert tools.sqnr(tools.outputs_of(result.layered, digits.test), want) > 15


# --- data ------------------------------------------------------------------------------------------------------------


def test_batches_may_have_different_shapes(wide: Path, tools: Any, tmp_path: Path) -> None:
    pieces = [noise(4, 3), noise(4, 9), noise(2, 5)]
    result = run_nncf(wide, tmp_path / "q.onnx", Dataset("pieces", lambda size: iter(pieces)))
    assert (result.params["batches"], result.params["samples"]) == (3, 10)
    assert tools.sqnr(tools.outputs_of(tmp_path / "q.onnx", noise()), tools.outputs_of(wide, noise())) > 20


def test_samples_are_limited_and_counted(wide: Path, tmp_path: Path) -> None:
    class Told(Progress):
        seen: list[Any] = []  # noqa: RUF012

        def advance(self, done: int, total: int | None, unit: str) -> None:
            self.seen.append((done, total, unit))

    config = StaticConfig(engine="nncf", batch_size=2, max_samples=5)
    result = run_nncf(wide, tmp_path / "q.onnx", Dataset.from_arrays(noise()), config, progress=Told())
    assert (result.params["batches"], result.params["samples"]) == (3, 5)
    assert {(3, 3, "batches"), (1, 3, "batches")} <= set(Told.seen)


def test_data_that_do_not_fit_are_told_as_such(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="x"):
        run_nncf(wide, tmp_path / "q.onnx", Dataset.from_arrays({"other": np.zeros((4, 2), np.float32)}))
    with pytest.raises(DataError, match="too few"):
        run_nncf(wide, tmp_path / "q.onnx", Dataset("none", lambda size: iter(())))
    with pytest.raises(OptimizationError, match="--data"):
        optimize(wide, NNCF, tmp_path / "q.onnx", check=lambda path: None)
    assert [p.name for p in tmp_path.iterdir()] == ["wide.onnx"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"smooth": "off"}, "--smooth"),
        ({"smooth": 0.5}, "--smooth"),
        ({"equalize": True}, "--equalize"),
        ({"bias_correction": "fast"}, "--bias-correction"),
        ({"rounding": "adaround"}, "--rounding"),
        ({"calibration": "mse"}, "--calibration"),
        ({"percentile": 99.0}, "--percentile"),
        ({"merge": ("a.npz",)}, "--merge"),
        ({"save_calibration": "a.npz"}, "--save-calibration"),
        ({"equalize": True, "smooth": "off"}, "--smooth and no --equalize"),
    ],
)
def test_options_of_our_own_engine_are_refused(wide: Path, tmp_path: Path, options: Any, named: str) -> None:
    with pytest.raises(OptimizationError, match=f"knows no {named}") as caught:
        run_nncf(wide, tmp_path / "q.onnx", Dataset.from_arrays(noise()), StaticConfig(engine="nncf", **options))
    assert "--engine deploykit" in str(caught.value.hint)
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize(("engine", "word"), [("vitis", "deploykit or nncf"), ("both", "two engines")])
def test_other_engines(wide: Path, tmp_path: Path, engine: str, word: str) -> None:
    with pytest.raises(OptimizationError, match=word):
        run_nncf(wide, tmp_path / "q.onnx", Dataset.from_arrays(noise()), StaticConfig(engine=engine))


def test_nothing_left_to_quantize(wide: Path, tmp_path: Path) -> None:
    data = Dataset.from_arrays(noise())
    with pytest.raises(OptimizationError, match="nothing to quantize"):
        run_nncf(wide, tmp_path / "q.onnx", data, StaticConfig(engine="nncf", exclude=("first", "second")))
    with pytest.raises(OptimizationError, match="'nosuch' names no node"):
        run_nncf(wide, tmp_path / "q.onnx", data, StaticConfig(engine="nncf", exclude=("nosuch",)))


def test_half_precision_is_left_alone(wide: Path, tmp_path: Path) -> None:
    model = onnx.load(wide)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, wide)
    with pytest.raises(OptimizationError, match="float32 weights"):
        run_nncf(wide, tmp_path / "q.onnx", Dataset.from_arrays({"x": noise()["x"].astype(np.float16)}))


def test_a_failure_inside_is_one_error_with_a_way_out(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nncf

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise nncf.ValidationError("something\nwent wrong")

    monkeypatch.setattr(nncf, "quantize", fail)
    with pytest.raises(OptimizationError, match=r"NNCF failed \(ValidationError: something\)") as caught:
        run_nncf(wide, tmp_path / "q.onnx", Dataset.from_arrays(noise()))
    assert "--exclude" in str(caught.value.hint)
    assert isinstance(caught.value.__cause__, nncf.ValidationError)
    assert [p.name for p in tmp_path.iterdir()] == ["wide.onnx"]


def test_missing_it_names_the_extra(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingDependencyError, match=r"\[nncf\]"):
        run_nncf(wide, tmp_path / "q.onnx", Dataset.from_arrays(noise()))


def test_models_over_2_gb_are_left_to_our_own_engine(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploykit.optimizers.quantize_nncf.INLINE_LIMIT_BYTES", 1000)
    with pytest.raises(OptimizationError, match="up to 2 GB") as caught:
        run_nncf(wide, tmp_path / "q.onnx", Dataset.from_arrays(noise()))
    assert "--engine deploykit" in str(caught.value.hint)


def test_nothing_is_escalated(wide: Path) -> None:
    assert list(escalation(wide, NNCF)) == [NNCF]


# --- manners ---------------------------------------------------------------------------------------------------------

_QUIET = """
import json, logging, sys, types
from pathlib import Path

sent = []
class Telemetry:
    def __init__(self, *args, **kwargs): sent.append("made")
    def start_session(self, *args, **kwargs): sent.append("start")
    def send_event(self, *args, **kwargs): sent.append("event")
    def end_session(self, *args, **kwargs): sent.append("end")
{before}
del sent[:]
import numpy as np
from deploykit.data import Dataset
from deploykit.optimizers import StaticConfig, optimize
from deploykit.runtimes import open_session

data = Dataset.from_arrays({{"x": np.random.default_rng(1).normal(size=(8, 3, 32)).astype(np.float32)}})
given = {{"check": lambda p: None, "open_model": lambda p: open_session(p, "ort:cpu").run, "data": data}}
optimize(Path(sys.argv[1]), StaticConfig(engine="nncf"), Path(sys.argv[2]), **given)
seen = [m for m in sys.modules if m.startswith("openvino_telemetry.")]
print(json.dumps([sent, seen, logging.getLoggerClass().__name__, logging.getLogger("nncf").level]))
"""
_FAKE = """
sys.modules["openvino_telemetry"] = types.ModuleType("openvino_telemetry")
sys.modules["openvino_telemetry"].Telemetry = Telemetry
import nncf
nncf.set_log_level(logging.INFO)
logging.setLoggerClass(logging.Logger)
"""


@pytest.mark.parametrize("before", ["", _FAKE], ids=["alone", "imported by somebody else"])
def test_nothing_is_printed_and_nothing_is_sent(wide: Path, tmp_path: Path, before: str) -> None:
    """NNCF would tell its maker of each call, log to standard output, and draw bars there."""
    ran = subprocess.run(
        [sys.executable, "-c", _QUIET.format(before=before), str(wide), str(tmp_path / "q.onnx")],
        cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert json.loads(ran.stdout) == [[], [], "Logger", logging.INFO]
    assert ran.stderr == ""
    assert (tmp_path / "q.onnx").is_file()
