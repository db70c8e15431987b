"""Every cell of docs/export-matrix.md, measured again."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "export-matrix.md"
WRITE = "python benchmarks/suite/export_matrix.py --write docs/export-matrix.md"

sys.path.insert(0, str(ROOT / "benchmarks" / "suite"))
matrix: Any = importlib.import_module("export_matrix")
zoo: Any = importlib.import_module("hf_zoo")
sys.path.pop(0)

DOCUMENTED = matrix.parse(DOCUMENT.read_text())


def test_the_document_has_every_graph() -> None:
    graphs = {(m, part) for m in zoo.ARCHITECTURES for part in zoo.PARTS.get(m, ("",))}
    assert set(DOCUMENTED) == {(m, part, path) for m, part in graphs for path in matrix.PATHS}, WRITE


def test_red_cells_have_reasons() -> None:
    text = DOCUMENT.read_text()
    for line in text.splitlines():
        if line.startswith("|") and ("| no |" in line or "attention" in line):
            assert "[" in line.split("|")[-2], f"no reason: {line}"
    assert matrix.Cell("T5", "", "torch.export", ("no operator", "")).marks == ("no", "yes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder a model: what is saved for one path serves the other."""
    return functools.cache(tmp_path_factory.mktemp)


@pytest.mark.parametrize("path", matrix.PATHS)
@pytest.mark.parametrize("model", zoo.ARCHITECTURES)
def test_cell(model: str, path: str, folder: Callable[[str], Path]) -> None:
    for cell in matrix.measure(model, path, folder(model)):
        documented = DOCUMENTED[model, cell.part, path]
        assert cell.marks == documented, f"{cell}; if this is right: {WRITE}"
