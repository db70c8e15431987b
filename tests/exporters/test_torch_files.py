"""Files of torch that are no programs of torch.export: named for what they are, and never unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploykit.errors import SourceError


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def net() -> Any:
    import torch

    return torch.nn.Linear(2, 2)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_weights(opened: Any, message: Any, net: Any, tmp_path: Path, suffix: str) -> None:
    import torch

    torch.save(net.state_dict(), tmp_path / f"m{suffix}")
    text = message(SourceError, lambda: opened(tmp_path / f"m{suffix}"))
    assert "holds weights only" in text
    assert "weights_only=True" in text


def test_pickled_modules_are_not_unpickled(opened: Any, message: Any, net: Any, tmp_path: Path) -> None:
    import torch

    net.mark = Touch(tmp_path / "ran")
    torch.save(net, tmp_path / "m.pt")
    assert "is a pickled module" in message(SourceError, lambda: opened(tmp_path / "m.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".ts"])
def test_torchscript(opened: Any, message: Any, net: Any, tmp_path: Path, suffix: str) -> None:
    import torch

    torch.jit.script(net).save(str(tmp_path / f"m{suffix}"))
    text = message(SourceError, lambda: opened(tmp_path / f"m{suffix}"))
    assert "is a TorchScript program" in text
    assert "torch.jit.load(" in text


def test_programs_under_another_name(opened: Any, message: Any, build: Any, tmp_path: Path) -> None:
    build.pt2(tmp_path / "m.pt2").rename(tmp_path / "m.pt")
    assert "rename it to m.pt2" in message(SourceError, lambda: opened(tmp_path / "m.pt"))


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"PK\x05\x06" + bytes(18)])
def test_anything_else(opened: Any, message: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    assert "cannot be exported" in message(SourceError, lambda: opened(tmp_path / "m.pt"))
