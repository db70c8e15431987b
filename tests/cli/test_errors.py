"""Whatever the user does wrong: one line that says what to do, exit code 1, and nothing written or overwritten."""

import resource

import pytest

FACTORY = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x)

class NoOnnx(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x @ x.transpose(-1, -2)).real

def make():
    torch.manual_seed(0)
    return Net(), (torch.randn(2, 4),)

def raises():
    raise ValueError("boom")

def number():
    return 42

def contradiction():
    return Net(), (torch.randn(2, 5),)

def unsupported():
    return NoOnnx(), (torch.randn(2, 3, 3),)

def constant():
    net = Net()
    torch.nn.init.zeros_(net.linear.weight)
    return net, (torch.randn(2, 4),)
"""


def assert_refused(done, folder, *words):
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    for word in words:
        assert word in error[0], error[0]
    assert not (folder / "out").exists()
    assert not list(folder.glob(".out*"))


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(FACTORY, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("net.py:raises", ["boom", "net.py:"]),
        ("net.py:number", ["42", "torch.nn.Module"]),
        ("net.py:nosuch", ["nosuch", "make"]),
        ("net.py:contradiction", ["float32[2, 5]"]),
        ("net.py:unsupported", ["eig"]),
        ("net.py:constant", ["no output changes when the inputs change", "--allow-unverified"]),
        ("missing.py:make", ["missing.py"]),
        ("missing.onnx", ["missing.onnx"]),
        ("corrupt.onnx", ["corrupt.onnx"]),
        ("pickled.pt", ["factory"]),
    ],
)
def test_export_refuses(cli, factory, tmp_path, source, words):
    (tmp_path / "corrupt.onnx").write_bytes(b"\x08\x09 no model at all")
    (tmp_path / "pickled.pt").write_bytes(b"PK")
    assert_refused(cli("export", source, "-o", "out"), tmp_path, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dynamic", "foo"], ["--dynamic 'foo'", "name:axis=symbol"]),
        (["--dynamic", "none", "--dynamic", "x:0=b"], ["none"]),
        (["--dynamic", "x:7=b"], ["axis 7", "below 2"]),
        (["--input", "x"], ["--input 'x'", "name=dtype"]),
        (["--part", "encoder"], ["--part", "Hugging Face"]),
        (["--dim", "width=3"], ["'width'", "one of batch"]),
        (["--dynamic", "none", "--dim", "batch=3"], ["'batch'", "all dimensions are fixed"]),
    ],
)
def test_options_that_do_not_fit(cli, factory, tmp_path, options, words):
    """The error alone: no log of the frameworks is kept for a slip of the user's."""
    done = cli("export", "net.py:make", "-o", "out", *options)
    assert_refused(done, tmp_path, *words)
    assert "what the frameworks printed" not in done.stderr


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1", "soon"])
@pytest.mark.parametrize("command", [["export", "net.py:make"], ["simplify", "-m", "model"]])
def test_times_that_are_none(cli, tmp_path, command, seconds):
    done = cli(*command, "-o", "out", "--timeout", seconds)
    assert done.returncode == 2
    assert "positive number of seconds" in done.stderr


def test_existing_output_is_left_alone(cli, conv_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("keep")
    for command in (["export", conv_model], ["simplify", "-m", conv_model], ["quantize", "dynamic", "-m", conv_model]):
        done = cli(*command, "-o", "out")
        assert done.returncode == 1
        assert "exists" in done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]
    assert (tmp_path / "out" / "file").read_text() == "keep"


def test_full_disk(run_cli, conv_model, tmp_path):
    """A limit on the size of a file stands for a full disk: the write fails in the same place."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    done = run_cli("export", conv_model, "-o", "out", preexec=limit)
    assert_refused(done, tmp_path, "cannot write", "nothing was left behind")


def test_allow_unverified_says_so_in_the_manifest(cli, factory, tmp_path):
    import json

    done = cli("export", "net.py:constant", "-o", "out", "--allow-unverified", "--json")
    assert done.returncode == 0, done.stderr
    verdicts = {r["verdict"] for r in json.loads(done.stdout)["manifest"]["evidence"]["parity"]}
    assert verdicts == {"unverifiable"}


def test_data_that_do_not_fit(cli, conv_model, tmp_path):
    import numpy as np

    np.savez(tmp_path / "wrong.npz", x=np.zeros((8, 3, 5, 5), np.float32))
    images = np.zeros((8, 3, 12, 12), np.float32)
    np.savez(tmp_path / "nameless.npz", z=images, w=images)
    static = ["quantize", "static", "-m", conv_model, "-o", "out", "--data"]
    assert_refused(cli(*static, "wrong.npz"), tmp_path, "x: float32[batch, 3, 12, 12]")
    assert_refused(cli(*static, "nameless.npz"), tmp_path, "'x'")
    assert_refused(cli(*static, "missing.npz"), tmp_path, "missing.npz")


def test_a_quantizer_with_nothing_to_do_is_an_error(cli, conv_model, tmp_path):
    quantized = cli("quantize", "static", "-m", conv_model, "--data", "calib.npz", "-o", "q")
    assert quantized.returncode == 0, quantized.stderr
    again = cli("quantize", "static", "-m", "q", "--data", "calib.npz", "-o", "out")
    assert_refused(again, tmp_path, "quantized already")


def test_a_tampered_artifact_is_refused_by_every_command(cli, conv_model, tmp_path):
    assert cli("export", conv_model, "-o", "a").returncode == 0
    model = tmp_path / "a" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    for command in (
        ["simplify", "-m", "a", "-o", "out"],
        ["inspect", "a"],
        ["verify", "-m", "a"],
        ["benchmark", "-m", "a"],
    ):
        assert_refused(cli(*command), tmp_path, "sha256")


def test_devices_never_fall_back(cli, conv_model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    missing = next(
        p for p in ("ROCMExecutionProvider", "DmlExecutionProvider") if p not in onnxruntime.get_available_providers()
    )
    assert_refused(cli("benchmark", "-m", conv_model, "--device", missing), tmp_path, missing)
    assert_refused(cli("export", conv_model, "-o", "out", "--device", missing), tmp_path, missing)
    assert_refused(cli("export", conv_model, "-o", "out", "--device", "nosuch:gpu"), tmp_path, "doctor")


def test_exclude_takes_types_and_refuses_unknown_names(cli, conv_model, tmp_path):
    import json

    static = ["quantize", "static", "-m", conv_model, "--data", "calib.npz", "-o"]
    assert_refused(cli(*static, "out", "--exclude", "nosuch"), tmp_path, "nosuch")
    assert_refused(cli("quantize", "dynamic", "-m", conv_model, "-o", "out", "--exclude", "typo"), tmp_path, "typo")
    only_gemm = cli(*static, "kept", "--exclude", "Conv", "--json")
    assert only_gemm.returncode == 0, only_gemm.stderr
    assert json.loads(only_gemm.stdout)["manifest"]["lineage"][-1]["params"]["quantized_nodes"] == 1
    # Without its one matrix product nothing is left for dynamic quantization.
    assert_refused(cli("quantize", "dynamic", "-m", conv_model, "-o", "out", "--exclude", "Gemm"), tmp_path)
