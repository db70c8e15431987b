"""The words on the command line: which kind of source they name, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from deploykit.errors import ExportError, SourceError


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl", ".joblib", ".safetensors", ".py"])
def test_files_that_hold_no_graph(opened: Any, message: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    assert "does not exist" in message(SourceError, lambda: opened(path))
    path.write_bytes(b"\x80\x04.")
    text = message(SourceError, lambda: opened(path))
    assert "cannot be exported" in text
    assert "file.py:factory" in text


def test_pickles_are_refused_unread(opened: Any, message: Any, tmp_path: Path) -> None:
    import pickle

    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    for suffix in (".pt", ".pth", ".bin", ".pkl"):
        (tmp_path / f"m{suffix}").write_bytes(pickle.dumps(Touch()))
        message(SourceError, lambda suffix=suffix: opened(tmp_path / f"m{suffix}"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no/such/thing", "does not exist"),
        ("no_such_file.py:build", "does not exist"),
        ("no_such_package.models:build", "cannot be found"),
        ("json:no_such_function", "has no 'no_such_function'"),
        ("json:", "names no function"),
        (":build", "names no function"),
        ("json:dumps()", "names no function"),
    ],
)
def test_names_of_nothing(opened: Any, message: Any, source: str, said: str) -> None:
    assert said in message(SourceError, lambda: opened(source))


def test_unknown_file(opened: Any, message: Any, tmp_path: Path) -> None:
    (tmp_path / "model.mlmodel").touch()
    assert "no known kind" in message(SourceError, lambda: opened(tmp_path / "model.mlmodel"))


def test_file_that_fails_on_import(opened: Any, message: Any, tmp_path: Path) -> None:
    (tmp_path / "bad_on_import.py").write_text("import os\nraise RuntimeError('two\\nlines')\n")
    text = message(SourceError, lambda: opened(f"{tmp_path}/bad_on_import.py:build"))
    assert "RuntimeError: two" in text
    assert "bad_on_import.py:2" in text


def test_colon_in_a_path(opened: Any, build: Any, tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    onnx.save(build.text_model(), tmp_path / "a:b" / "m.onnx")
    assert opened(tmp_path / "a:b" / "m.onnx").kind == "onnx"


@pytest.mark.parametrize(
    ("options", "said"),
    [({"way": "tensorflow"}, "unknown exporter"), ({"opset": 9}, "13 or newer"), ({"opset": 99999}, "13 to ")],
)
def test_options_of_no_meaning(opened: Any, message: Any, options: dict[str, Any], said: str) -> None:
    assert said in message(ExportError, lambda: opened("classifier", **options))


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, pkgutil, importlib, deploykit.exporters as e\n"
        "[importlib.import_module(f'deploykit.exporters.{m.name}') for m in pkgutil.iter_modules(e.__path__)]\n"
        "heavy = {'torch', 'onnx', 'onnxscript', 'transformers', 'onnxruntime', 'openvino'}\n"
        "heavy |= {'sklearn', 'skl2onnx', 'keras', 'tensorflow', 'tf2onnx'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print(sorted(m for m in sys.modules if m.startswith(('deploykit.optimizers', 'deploykit.runtimes', "
        "'deploykit.benchmarks'))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
