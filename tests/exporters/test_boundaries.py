"""Sizes at which `forward` takes another path are compared, however far they are from the example's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.errors import ParityError
from deploykit.exporters import Way, export
from deploykit.exporters.boundaries import compared_sizes
from deploykit.exporting import export as export_verified

DYNAMIC = ("x:0=batch,1=rows",)


@pytest.mark.parametrize("factory", ["cut", "cut_recurrent"])
@pytest.mark.parametrize("way", ["torch.export", "torchscript"])
def test_the_other_path_becomes_a_case(opened: Any, tmp_path: Path, factory: str, way: str) -> None:
    source = opened(factory, dynamic=DYNAMIC)
    before = len(source.cases_for(Way(way, True)))
    export(source, Way(way, True), tmp_path / "m.onnx")
    cases = source.cases_for(Way(way, True))
    assert 65 in {case.sizes["rows"] for case in cases[before:]}
    assert all(np.isfinite(case.outputs["output"]).all() for case in cases)
    assert len(source.cases_for(Way(way, False))) == 4


@pytest.mark.parametrize("factory", ["cut", "cut_recurrent"])
def test_a_graph_that_holds_on_one_side_is_refused(build: Any, message: Any, tmp_path: Path, factory: str) -> None:
    source = f"{build.zoo}:{factory}"
    text = message(ParityError, lambda: export_verified(source, tmp_path / "out", dynamic=DYNAMIC, devices=["ort:cpu"]))
    assert "rows=65" in text
    assert not (tmp_path / "out").exists()


def test_a_bound_that_the_source_has_itself_is_no_objection(build: Any, opened: Any, tmp_path: Path) -> None:
    source = opened("table", dynamic=DYNAMIC)
    way = Way("torch.export", True)
    export(source, way, tmp_path / "m.onnx")
    assert max(case.sizes["rows"] for case in source.cases_for(way)) == 64
    assert source.notes_on(way) == ()


def test_torch_is_as_it_was() -> None:
    import torch

    before = dict(vars(torch.Tensor))
    with compared_sizes() as found:
        assert bool(torch.tensor(3) > 2)
    assert found == []  # not in a trace
    assert dict(vars(torch.Tensor)) == before
