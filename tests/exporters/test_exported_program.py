"""`.pt2` files: names, limits, and what is refused before anything is unpickled."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploykit.benchmarks.parity import Verdict, compare
from deploykit.errors import ExportError, SourceError
from deploykit.exporters import export
from deploykit.runtimes import open_session


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, build: Any) -> Path:
    path: Path = build.pt2(tmp_path_factory.mktemp("pt2") / "program.pt2")
    return path


def rewritten(path: Path, target: Path, change: Any) -> Path:
    """The archive with every member passed through ``change(name, data)``; None leaves it out."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


def test_constants_stay_fixed_and_symbols_are_readable(opened: Any, program: Path) -> None:
    source = opened(program)
    assert source.data == "example"
    assert [str(s) for s in source.signature.inputs] == ["x: float32[batch, 6]", "bias: float32[batch, 6]"]
    assert {case.sizes["batch"] for case in source.cases} >= {1, 3, 4}
    case = source.cases[0]
    assert np.allclose(case.outputs["output"], case.feeds["x"] ** 3 + case.feeds["bias"], atol=1e-5)


def test_dimensions_can_be_renamed_but_not_made(opened: Any, message: Any, program: Path) -> None:
    assert opened(program, dynamic=("x:0=rows",)).signature.symbols == ("rows",)
    assert opened(program, dynamic=("batch",)).signature.symbols == ("batch",)
    for wish in ("x:1=width", "x:7=width", "z:0=rows", "x:0=", "x", "none"):
        message(ExportError, lambda wish=wish: opened(program, dynamic=(wish,)))


@pytest.mark.parametrize("options", [{"way": "torchscript"}, {"inputs": ("x=float32[2,6]",)}])
def test_options_that_do_not_apply(opened: Any, message: Any, program: Path, options: Any) -> None:
    message(ExportError, lambda: opened(program, **options))


@pytest.mark.parametrize("content", [b"", b"random", bytes(range(256)) * 9])
def test_files_that_are_no_archives(opened: Any, message: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.pt2").write_bytes(content)
    assert "not a .pt2 archive" in message(SourceError, lambda: opened(tmp_path / "p.pt2"))


def test_cut_off_archive(opened: Any, message: Any, program: Path, tmp_path: Path) -> None:
    data = program.read_bytes()
    (tmp_path / "p.pt2").write_bytes(data[: len(data) // 2])
    message(SourceError, lambda: opened(tmp_path / "p.pt2"))


def test_archive_with_flipped_bytes(opened: Any, message: Any, program: Path, tmp_path: Path) -> None:
    data = bytearray(program.read_bytes())
    at = data.index(b"models/") + 60
    data[at : at + 200] = bytes(200)
    (tmp_path / "p.pt2").write_bytes(bytes(data))
    message(SourceError, lambda: opened(tmp_path / "p.pt2"))


def test_archive_of_something_else(opened: Any, message: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.pt2", "w") as archive:
        archive.writestr("hello.txt", "hello")
    message(SourceError, lambda: opened(tmp_path / "p.pt2"))


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def evil(path: Path) -> bytes:
    """What torch.save makes of an object that runs code."""
    buffer = io.BytesIO()
    torch.save(((Touch(path),), {}), buffer, pickle_module=pickle)
    return buffer.getvalue()


def test_pickled_example_inputs_do_not_run(opened: Any, message: Any, program: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    payload = evil(ran)
    bad = rewritten(program, tmp_path / "p.pt2", lambda n, d: payload if "sample_inputs" in n else d)
    assert "could run code" in message(SourceError, lambda: opened(bad))
    assert not ran.exists()


def test_pickled_weights_do_not_run(opened: Any, message: Any, program: Path, tmp_path: Path) -> None:
    marked = b'{"config": {"w": {"path_name": "weight_0", "is_param": true, "use_pickle": true, "tensor_meta": null}}}'
    bad = rewritten(program, tmp_path / "p.pt2", lambda n, d: marked if "weights_config" in n else d)
    assert "could run code" in message(SourceError, lambda: opened(bad))


def test_custom_objects_do_not_run(opened: Any, message: Any, program: Path, tmp_path: Path) -> None:
    marked = (
        b'{"config": {"o": {"path_name": "opaque_obj_0", "is_param": false, "use_pickle": false, "tensor_meta": null}}}'
    )
    bad = rewritten(program, tmp_path / "p.pt2", lambda n, d: marked if "constants_config" in n else d)
    assert "could run code" in message(SourceError, lambda: opened(bad))


def test_missing_file(opened: Any, message: Any, tmp_path: Path) -> None:
    assert "does not exist" in message(SourceError, lambda: opened(tmp_path / "p.pt2"))


class Halves(torch.nn.Module):
    """Two inputs, the second twice as long as the first."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.tanh() + y.reshape(y.shape[0], 2, -1).sum(1)


@pytest.mark.parametrize("visible", [True, False])
def test_dimensions_that_follow_from_others(opened: Any, tmp_path: Path, visible: bool) -> None:
    """`2*s`, where `s` is a dimension itself, and where it is none."""
    half = torch.export.Dim("half", min=2, max=64)
    module: torch.nn.Module = Halves() if visible else torch.nn.Tanh()
    shapes: tuple[Any, ...] = ({1: half}, {1: 2 * half}) if visible else ({1: 2 * half},)
    inputs = (torch.randn(3, 4), torch.randn(3, 8))[0 if visible else 1 :]
    torch.export.save(torch.export.export(module, inputs, dynamic_shapes=shapes), tmp_path / "p.pt2")
    source = opened(tmp_path / "p.pt2")
    long = source.signature.inputs[-1]
    assert len(source.cases) >= 3
    sizes = {case.feeds[long.name].shape[1] for case in source.cases}
    assert len(sizes) >= 3
    assert all(size % 2 == 0 for size in sizes)
    assert not any("does not run" in note for note in source.notes)
    export(source, source.ways[0], tmp_path / "m.onnx")
    with open_session(tmp_path / "m.onnx", "ort:cpu") as session:
        found = [session.run(case.feeds) for case in source.cases]
    assert compare([case.outputs for case in source.cases], found).verdict is Verdict.PASSED


def test_limits_of_the_program_are_kept(opened: Any, tmp_path: Path) -> None:
    rows = torch.export.Dim("rows", min=3, max=6)
    program = torch.export.export(torch.nn.Tanh(), (torch.randn(4, 2),), dynamic_shapes=({0: rows},))
    torch.export.save(program, tmp_path / "p.pt2")
    source = opened(tmp_path / "p.pt2")
    assert {case.sizes["batch"] for case in source.cases} == {3, 4, 5}
    assert source.notes == ()
