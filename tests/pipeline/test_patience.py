"""Ways that were left for their time: tried again, with more of it, before shapes are fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploykit import graph_exporting
from deploykit.errors import ExportError, TimeLimitError
from deploykit.exporters import Source, Way
from deploykit.progress import Progress
from deploykit.specs import Signature


class Slow(Source):
    """torch.export only ends where it may take its time; TorchScript fails."""

    kind, label, data = "pytorch", "slow", "example"
    signature = Signature((), ())

    def __init__(self, ends: bool) -> None:
        self.tried: list[tuple[str, bool]] = []
        self.ends = ends
        self.cases = ()

    @property
    def ways(self) -> tuple[Way, ...]:
        return Way("torch.export", True), Way("torchscript", True), Way("torch.export", False)

    def write(self, way: Way, target: Path, opset: int | None) -> None:
        self.tried.append((str(way), way.patient))
        if way.name == "torchscript":
            raise ExportError("no")
        if not way.patient or not self.ends:
            raise TimeLimitError("it took more than 1 s", hint="give it more: --timeout 10")

    def tools(self) -> dict[str, str]:
        return {}


def first_right(source: Slow, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(graph_exporting, "_parity_records", lambda *args, **kwargs: ([], set()))
    told = Progress()
    way, _, _ = graph_exporting._export_first_right(
        source, [], folder / "m.onnx", None, folder / "log", told, [], strict=False
    )
    return way, told.notes


def test_more_time_comes_before_fixed_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Slow(ends=True)
    way, notes = first_right(source, tmp_path, monkeypatch)
    assert source.tried == [("torch.export", False), ("torchscript", False), ("torch.export", True)]
    assert (way, way.patient) == (Way("torch.export", True), True)
    assert "torch.export was not used: it took more than 1 s" in notes


def test_each_way_gets_more_time_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Slow(ends=False)
    with pytest.raises(ExportError) as caught:
        first_right(source, tmp_path, monkeypatch)
    assert source.tried == [
        ("torch.export", False), ("torchscript", False), ("torch.export", True),
        ("torch.export with fixed shapes", False), ("torch.export with fixed shapes", True),
    ]  # fmt: skip
    assert str(caught.value).count("it took more than 1 s") == 1
    assert "--timeout 10" in str(caught.value)
