"""Functions that a user names, `package.module:name` or `path/file.py:name`: importing them runs the user's code."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from deploykit.errors import SourceError, first_line

_STANDARD_LIBRARY = str(Path(contextlib.__file__).parent)


def load_object(text: str) -> Any:
    """Import `package.module:name` or `path/file.py:name`; runs the user's code, because the user named it.

    Raises:
        SourceError: Not of that form, not found, or it raised.
    """
    where, sep, name = text.rpartition(":")
    if not sep or not where or not name.isidentifier():
        raise SourceError(f"{text!r} names no function", expected="path/file.py:function or package.module:function")
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    if not hasattr(module, name):
        known = ", ".join(sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))[:8])
        raise SourceError(f"{where} has no {name!r}", expected=f"one of: {known}" if known else "a function there")
    return getattr(module, name)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SourceError(f"{path} does not exist", expected="path/file.py:function")
    folder = str(path.parent.resolve())
    name = f"_deploykit_user_{path.stem}_{abs(hash(str(path.resolve()))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} is no Python file", expected="path/file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as exc:
        del sys.modules[name]
        raise SourceError(
            f"{path} failed on import ({first_line(exc)}{user_frame(exc)})", hint="mend the file"
        ) from exc
    return module


def _load_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name and (name == exc.name or name.startswith(exc.name + ".")):
            raise SourceError(
                f"module {name} cannot be found",
                expected="package.module:function on the Python path, or file.py:function",
            ) from exc
        raise SourceError(f"{name} failed on import ({first_line(exc)}{user_frame(exc)})") from exc
    except Exception as exc:
        raise SourceError(
            f"{name} failed on import ({first_line(exc)}{user_frame(exc)})", hint="mend the module"
        ) from exc


def user_frame(exc: BaseException) -> str:
    """`` at file.py:12`` for the innermost frame that is not in a library; empty where there is none."""
    found = ""
    frame = exc.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if (
            not file.startswith("<")
            and "site-packages" not in file
            and not file.startswith(_STANDARD_LIBRARY)
            and Path(file).parts[-2:-1] != ("deploykit",)
        ):
            found = f" at {Path(file).name}:{frame.tb_lineno}"
        frame = frame.tb_next
    return found
