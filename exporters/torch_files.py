"""`.pt`, `.pth` and their like: what such a file is, found out without unpickling anything, and why it is refused.

TorchScript archives are refused too. `torch.jit.load` unpickles with a restricted reader, but the archive is a program:
its `__setstate__` methods run on loading and its operators can read and write files. torch's own security policy says
to treat it as code. A factory that calls `torch.jit.load` is the user's decision, and is exported.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

from deploykit.errors import SourceError

SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".ts", ".torchscript", ".ptl"})

_FACTORY = "write a factory that builds the module and loads its weights, and export file.py:factory"
# Classes that a plain state_dict needs, by module.
_PLAIN = (
    "collections",
    "torch._utils",
    "torch",
    "torch.storage",
    "torch.serialization",
    "numpy",
    "builtins",
    "_codecs",
)
_LIMIT_BYTES = 64 << 20


def refusal(path: Path) -> SourceError:
    """The error for a file of torch that is not a program of `torch.export`."""
    kind = _kind(path)
    if kind == "torchscript":
        return SourceError(
            f"{path} is a TorchScript program, and loading it runs code out of the file",
            hint=f"if you trust it, export a factory: def make(): return torch.jit.load({str(path)!r}), example_inputs",
        )
    if kind == "pt2":
        return SourceError(
            f"{path} is a program of torch.export under another name",
            expected="the suffix .pt2",
            hint=f"rename it to {path.with_suffix('.pt2').name}",
        )
    if kind == "module":
        return SourceError(
            f"{path} is a pickled module, and unpickling runs whatever code the file holds",
            hint=f"{_FACTORY}; if you trust it: return torch.load({str(path)!r}, weights_only=False), example_inputs",
        )
    if kind == "weights":
        return SourceError(
            f"{path} holds weights only; pickled weights do not hold the model's code",
            hint=f"{_FACTORY}: net.load_state_dict(torch.load({str(path)!r}, weights_only=True))",
        )
    return SourceError(f"{path} cannot be exported", hint=f"pickled weights do not hold the model's code; {_FACTORY}")


def _kind(path: Path) -> str:
    """One of "torchscript", "pt2", "module", "weights", or empty where it is none of them."""
    if not zipfile.is_zipfile(path):
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
            if "constants.pkl" in names or any(name.startswith("code/") for name in names):
                return "torchscript"
            if "archive_format" in names or any(name.startswith("models/") for name in names):
                return "pt2"
            member = next((n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl"), None)
            if member is None or archive.getinfo(member).file_size > _LIMIT_BYTES:
                return ""
            return "weights" if _only_plain(archive.read(member)) else "module"
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError):
        return ""  # damaged or encrypted: no kind that can be read, which is what the caller refuses it for


def _only_plain(data: bytes) -> bool:
    """Whether a pickle names no classes but those of plain tensors; its instructions are read, not run."""
    texts: list[str] = []
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == "GLOBAL":
            if str(argument).partition(" ")[0] not in _PLAIN:
                return False
        elif operation.name == "STACK_GLOBAL":
            if len(texts) >= 2 and texts[-2] not in _PLAIN:
                return False
        elif isinstance(argument, str):
            texts.append(argument)
    return True
