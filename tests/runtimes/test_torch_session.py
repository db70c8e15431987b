"""PyTorch as a baseline: exported programs, eager and compiled."""

from __future__ import annotations

import io
import pickle
import shutil
import threading
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from deploykit.candidates import candidate_devices, enters
from deploykit.errors import DataError, DeviceError, InferenceError, ModelError
from deploykit.models import LoadedModel, benchmark_feeds, load_candidate, load_model
from deploykit.runtimes import open_session, parse_device, require_device

EAGER = "torch:cpu"
# torch.compile with a backend that compiles nothing: the whole way without a compiler's seconds.
COMPILED = ("torch-compile:cpu", {"backend": "eager"})


class Net(nn.Module):
    """Two inputs, a constant and a nest of outputs, one of them an input's own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Any, scale: Any, flag: bool = True) -> dict[str, Any]:
        x = torch.relu(self.conv(image)).mean((2, 3))
        return {"logits": self.head(x) * scale, "more": (scale.view(-1), self.head.bias, image if flag else x)}


def save(module: nn.Module, path: Path, *args: Any, dynamic: Any = None, **kwargs: Any) -> Path:
    program = torch.export.export(module.eval(), args, kwargs, dynamic_shapes=dynamic)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=16)
    args = (torch.randn(2, 3, 8, 8), torch.ones(2, 1))
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    return save(Net(), path, *args, True, dynamic=({0: batch}, {0: batch}, None))


def feeds(batch: int = 2, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(batch, 3, 8, 8)).astype(np.float32),
        "scale": rng.normal(size=(batch, 1)).astype(np.float32),
    }


def module_of(path: Path) -> Any:
    return torch.export.load(str(path)).module()


@pytest.fixture(params=["eager", "compiled"])
def session(request: pytest.FixtureRequest, program: Path) -> Any:
    device, settings = (EAGER, None) if request.param == "eager" else COMPILED
    with open_session(program, device, threads=1, settings=settings) as opened:
        yield opened


def test_names_shapes_and_numbers(session: Any, program: Path) -> None:
    assert [str(s) for s in session.signature.inputs] == ["image: float32[batch, 3, 8, 8]", "scale: float32[batch, 1]"]
    assert [s.name for s in session.signature.outputs] == ["logits", "more_0", "more_1", "more_2"]
    assert session.signature.outputs[0].shape == ("batch", 5)
    module = module_of(program)
    for batch in (1, 3, 2):
        given = feeds(batch, batch)
        found = session.run(dict(reversed(given.items())))
        with torch.inference_mode():
            wanted = module(*(torch.from_numpy(a) for a in given.values()), True)
        np.testing.assert_allclose(found["logits"], wanted["logits"].numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found["more_2"], given["image"])


def test_results_are_the_callers_own(session: Any) -> None:
    """Neither an input, nor a weight, nor another result lies in them."""
    first = feeds(seed=1)
    untouched = {n: a.copy() for n, a in first.items()}
    kept = session.run(first)
    copies = {n: a.copy() for n, a in kept.items()}
    for array in kept.values():
        array[:] = 7
    for name, array in first.items():
        np.testing.assert_array_equal(array, untouched[name])
    for name, array in session.run(first).items():
        np.testing.assert_array_equal(array, copies[name])


def test_layout_of_the_inputs_does_not_matter(session: Any) -> None:
    given = feeds(4)
    expected = session.run(given)["logits"]
    frozen = {n: a.copy() for n, a in given.items()}
    for array in frozen.values():
        array.flags.writeable = False
    back = {n: np.ascontiguousarray(a[::-1])[::-1] for n, a in given.items()}
    for other in (frozen, back, {n: np.asfortranarray(a) for n, a in given.items()}):
        np.testing.assert_allclose(session.run(other)["logits"], expected, rtol=1e-5, atol=1e-6)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"scale": None}, "'scale'"),
    "extra": ({"mask": np.zeros((2, 3), np.float32)}, "'mask'"),
    "dtype": ({"scale": np.ones((2, 1))}, "float64"),
    "rank": ({"scale": np.ones(2, np.float32)}, "1 dimensions"),
    "size": ({"image": np.zeros((2, 3, 9, 8), np.float32)}, "axis 2 is 9"),
    "symbol": ({"scale": np.ones((1, 1), np.float32)}, "'batch'"),
    "list": ({"scale": [[1.0], [2.0]]}, "'scale'"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("call", ["run", "placement", "bind"])
def test_wrong_feeds_are_data_errors(session: Any, case: str, call: str) -> None:
    change, word = WRONG[case]
    given = {n: a for n, a in (feeds() | change).items() if a is not None}
    with pytest.raises(DataError) as caught:
        getattr(session, call)(given)
    assert word in str(caught.value)
    assert session.run(feeds())["logits"].shape == (2, 5)


def test_sizes_beyond_the_programs_own(session: Any) -> None:
    assert session.run(feeds(16))["logits"].shape == (16, 5)
    with pytest.raises(InferenceError, match="batch is 17, and the program takes 1 to 16"):
        session.run(feeds(17))


def test_placement_and_operators(session: Any) -> None:
    placement = session.placement(feeds(), runs=2)
    assert placement.asked == "cpu"
    assert placement.share_of_nodes == placement.share_of_time == 1.0
    assert placement.precisions() == {"float32": 2}
    assert placement.summary()["ops"]["aten::conv2d"] == 1
    assert all(node.time_us >= 0 for node in placement.nodes)
    if session.device.runtime == "torch":
        found = {node.op: node for node in session.executed()}
        assert {"aten::conv2d", "aten::relu", "aten::linear"} <= found.keys()
        assert found["aten::conv2d"].precision == "float32"
    else:
        with pytest.raises(InferenceError, match="does not show"):
            session.executed()


def test_bound_inputs_and_requests(session: Any) -> None:
    given = feeds(3)
    expected = session.run(given)["logits"]
    bound = session.bind(given)
    bound.run()
    np.testing.assert_array_equal(bound.outputs()["logits"], expected)
    inputs = [feeds(1 + n % 3, n) for n in range(6)]
    wanted = [session.run(one)["logits"] for one in inputs]
    wrong: list[int] = []

    def work(request: Any, first: int) -> None:
        for turn in range(20):
            number = (first + turn) % len(inputs)
            if not np.allclose(request.run(inputs[number])["logits"], wanted[number], rtol=1e-4, atol=1e-5):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(r, 2 * i)) for i, r in enumerate(session.requests(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    session.close()
    for call in (bound.run, lambda: session.run(given), lambda: session.requests(1)[0].run(given)):
        with pytest.raises(InferenceError):
            call()


def test_threads_and_precision_belong_to_the_process(program: Path) -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with open_session(program, EAGER, threads=1) as one, open_session(program, EAGER, threads=2) as two:
            assert torch.get_float32_matmul_precision() == "highest"
            assert one.settings["float32_matmul_precision"] == "highest"
            for session, threads in ((one, 1), (two, 2), (one, 1)):
                session.run(feeds())
                assert torch.get_num_threads() == session.settings["num_threads"] == threads
        assert torch.get_num_threads() == before[0]
        assert torch.get_float32_matmul_precision() == "high"
        with open_session(program, EAGER, precision="native") as native:
            assert torch.get_float32_matmul_precision() == "high"
            assert "float32_matmul_precision" not in native.settings
    finally:
        torch.set_float32_matmul_precision(before[1])


def test_a_session_keeps_its_precision_where_an_older_one_is_closed(program: Path) -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.set_num_threads(2)
    try:
        one = open_session(program, EAGER, threads=1)
        one.run(feeds())
        two = open_session(program, EAGER, threads=1)
        one.close()
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cudnn.allow_tf32 is False
        two.run(feeds())
        two.close()
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32 is True
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.backends.cudnn.allow_tf32 = before[2]


def test_other_types_and_mutated_inputs(tmp_path: Path) -> None:
    class Types(nn.Module):
        def forward(self, ids: Any, half: Any, brain: Any) -> Any:
            half[:1].unsqueeze(0).add_(1)  # the input itself, through two views
            (ids * 1).mul_(3)
            return ids * 2, half * 1, brain + brain, ids > 0

    args = (torch.tensor([1, -2]), torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.bfloat16))
    path = save(Types(), tmp_path / "types.pt2", *args)
    given: dict[str, Any] = {
        "ids": np.array([3, -4]),
        "half": np.float16([0.5, 2]),
        "brain": np.array([1.5, 3]).astype(ml_dtypes.bfloat16),
    }
    with open_session(path, EAGER) as session:
        found = list(session.run(given).values())
        again = list(session.run(given).values())
    assert [a.dtype.name for a in found] == ["int64", "float16", "bfloat16", "bool"]
    np.testing.assert_array_equal(given["half"], np.float16([0.5, 2]))  # the caller's array is not written to
    for first, second, wanted in zip(found, again, ([6, -8], [1.5, 2], [3, 6], [True, False]), strict=True):
        np.testing.assert_array_equal(first.astype(np.float64), np.array(wanted, np.float64))
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("device", "options", "word"),
    [
        (EAGER, {"settings": {"backend": "eager"}}, "'backend'"),
        (EAGER, {"optimize": "basic"}, "never optimizes"),
        ("torch-compile:cpu", {"settings": {"backend": "no-such"}}, "no-such"),
        ("torch-compile:cpu", {"settings": {"modus": "x"}}, "backend, mode"),
        ("torch-compile:cpu", {"optimize": False}, "always optimizes"),
        (EAGER, {"threads": 0}, "0 threads"),
    ],
)
def test_settings_that_do_not_exist(program: Path, device: str, options: Any, word: str) -> None:
    with pytest.raises(DeviceError, match=word):
        open_session(program, device, **options)


def test_devices_that_cannot_be_had(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_device(EAGER) == parse_device(EAGER)
    with pytest.raises(DeviceError, match="finds no cuda:63"):
        open_session(program, "torch:cuda:63")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(DeviceError, match="no-such-compiler"):
        require_device("torch-compile:cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("device", ["torch:cuda", "torch-compile:cuda"])
def test_cuda(program: Path, device: str) -> None:
    with open_session(program, EAGER) as cpu, open_session(program, device) as session:
        given = feeds(3)
        np.testing.assert_allclose(session.run(given)["logits"], cpu.run(given)["logits"], rtol=1e-3, atol=1e-4)
        placement = session.placement(given)
        assert placement.share_of_time > 0.9
        bound = session.bind(given)
        bound.run()
        np.testing.assert_allclose(bound.outputs()["logits"], cpu.run(given)["logits"], rtol=1e-3, atol=1e-4)


# --- files -----------------------------------------------------------------------------------------------------------


class Boom:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_programs_that_need_unpickling_are_refused(program: Path, tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    payload = io.BytesIO()
    pickle.dump(Boom(mark), payload)
    bad = tmp_path / "bad.pt2"
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(bad, "w") as new:
        for name in old.namelist():
            new.writestr(name, payload.getvalue() if "sample_inputs" in name else old.read(name))
    for call in (lambda: open_session(bad, EAGER), lambda: load_candidate(bad)):
        with pytest.raises(ModelError, match="could run code"):
            call()
    assert not mark.exists()


@pytest.mark.parametrize("damage", ["deflated", "list", "words"])
def test_damaged_archives_are_an_error_of_ours(program: Path, tmp_path: Path, damage: str) -> None:
    bad = tmp_path / "bad.pt2"
    texts = {"list": b"[]", "words": b'{"config": ["weight_0"]}'}
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            wrong = name.endswith("_config.json") and damage in texts
            new.writestr(name, texts[damage] if wrong else old.read(name))
        inputs = next(info for info in new.infolist() if info.filename.endswith(".pt"))
        begins = inputs.header_offset + 30 + len(inputs.filename)
    if damage == "deflated":
        content = bytearray(bad.read_bytes())
        content[begins : begins + 40] = b"\xff" * 40
        bad.write_bytes(content)
    with pytest.raises(ModelError, match="is damaged"):
        open_session(bad, EAGER)


def test_files_of_another_kind(program: Path, net: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="torch:cpu"):
        open_session(program, "ort:cpu")
    with pytest.raises(ModelError, match="torch:cpu"):
        open_session(program, "openvino:cpu")
    with pytest.raises(ModelError, match=r"a \.pt2 file"):
        open_session(net, EAGER)
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(program.read_bytes()[:500])
    for call in (lambda: open_session(cut, EAGER), lambda: load_candidate(cut)):
        with pytest.raises(ModelError, match="cut off"):
            call()
    with pytest.raises(ModelError, match="does not exist"):
        load_candidate(tmp_path / "none.pt2")


# --- what a benchmark makes of them ----------------------------------------------------------------------------------


def test_a_program_as_a_candidate(program: Path, net: Path) -> None:
    loaded = load_candidate(program)
    assert loaded.digest
    assert loaded.size_bytes == program.stat().st_size
    assert [s.name for s in loaded.signature.outputs] == ["logits", "more_0", "more_1", "more_2"]
    assert loaded.sizes == {"batch": 2}
    given, origin, size = benchmark_feeds(loaded, None, 3, {})
    assert (len(given), origin, size) == (32, "generated", 3)
    with open_session(program, EAGER) as session:
        assert session.run(given[0])["logits"].shape == (3, 5)
    assert load_candidate(net).digest == load_model(net).digest
    with pytest.raises(ModelError):
        load_model(program)  # other verbs do not take it


def names(models: list[LoadedModel], devices: tuple[str, ...] = ()) -> list[str]:
    targets = candidate_devices(models, devices)
    return [
        f"{m.path.suffix} {device}" for m in models for device in targets if enters(m.path, device, named=bool(devices))
    ]


def test_models_meet_the_devices_that_read_them(program: Path, net: Path) -> None:
    ours, other = load_candidate(program), load_candidate(net)
    assert names([other, ours]) == [".onnx ort:cpu", ".onnx openvino:cpu", ".pt2 torch:cpu"]
    assert names([ours]) == [".pt2 torch:cpu"]
    assert names([other]) == [".onnx ort:cpu", ".onnx openvino:cpu"]
    assert names([ours, other], ("ort:cpu", "torch:cpu")) == [".pt2 torch:cpu", ".onnx ort:cpu"]
    for model, device, hint in ((ours, "ort:cpu", "torch:cpu"), (other, EAGER, "ort:cpu")):
        with pytest.raises(DeviceError, match=f"--device {hint}"):
            names([model], (device,))
    ir = Path("model.xml")
    assert not enters(ir, parse_device("ort:cpu"), named=False)
    assert enters(ir, parse_device("ort:cpu"), named=True)  # it was asked for, and is reported
    assert not enters(ir, parse_device(EAGER), named=True)


@pytest.mark.slow
def test_compiled_by_inductor_and_measured(program: Path, tmp_path: Path) -> None:
    from deploykit.pipeline import benchmark

    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler, and there is no g++ here")
    with open_session(program, EAGER) as eager, open_session(program, "torch-compile:cpu", threads=1) as compiled:
        for batch in (1, 3):
            np.testing.assert_allclose(
                compiled.run(feeds(batch))["logits"], eager.run(feeds(batch))["logits"], rtol=1e-4, atol=1e-5
            )
        ops = compiled.placement(feeds()).summary()["ops"]
    assert "compiled" in ops
    report = benchmark([program], devices=[EAGER, "torch-compile:cpu"], rounds=3, seconds=0.1, warmup_s=0.0, threads=1)
    assert [c["status"] for c in report.candidates] == ["ok", "ok"]
