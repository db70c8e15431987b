"""Every error that a user can cause.

DeploykitError
├── MissingDependencyError      an optional package is not installed
├── OutputExistsError           the output is there already; nothing is ever overwritten
├── StorageError                disk full, no permission, read-only file system
├── ArtifactError               an artifact directory is incomplete, changed or of an unknown version
├── DataError                   a dataset, or a feed, does not fit the model
├── SourceError                 the thing to export cannot be found, read or built
├── ModelError                  an ONNX or OpenVINO file is corrupt, unsafe or invalid
├── ExportError                 a good source could not be turned into ONNX
│   ├── OptionError             an option of the export that cannot be read, or that contradicts the source
│   └── TimeLimitError          a way to ONNX took longer than it may
├── ContractError               a model does not fit the runtime that it is for, or nothing is known about that runtime
├── ParityError                 the outputs differ from the reference
│   ├── UnverifiableError       the outputs do not react to the inputs, so that equality proves nothing
│   └── AccuracyError           a quantized model misses the accuracy that was asked for, or collapsed
├── DeviceError                 a runtime, provider or device is unknown or cannot be had
├── InferenceError              a runtime failed while it loaded or ran a model
├── OptimizationError           a step could not be applied
├── SpeedError                  a quantized model is not faster than its parent
├── BenchmarkError              a measurement could not be made
├── SearchError                 a search that cannot be made, or that found nothing that may be used
├── PackageError                a bundle cannot be made for a serving target, or is not what it has to be
├── WorkerError                 a process that did a job for us died, or could not be had
│   └── JobTimeoutError         a job took longer than it may
├── PluginError                 a step of another distribution does not load, or is not what it has to be
└── RecipeError                 a recipe does not say what to do

A third-party exception is translated where it enters, with ``raise ... from exc``. What is not a DeploykitError is a
bug of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import Any

_STORAGE_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
}


class DeploykitError(Exception):
    """Base class of all errors that a user can cause.

    Args:
        what: What happened, in one sentence without the final full stop.
        expected: What was expected instead.
        hint: The next command or edit.
    """

    def __init__(self, what: str, *, expected: str | None = None, hint: str | None = None) -> None:
        super().__init__(what, expected, hint)
        self.what = what
        self.expected = expected
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross process boundaries; ``Exception`` would pickle keyword arguments as positional ones."""
        return partial(type(self), expected=self.expected, hint=self.hint), (self.what,)

    def __str__(self) -> str:
        """One line: what happened; what was expected; what to do."""
        parts = [self.what]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.hint:
            parts.append(self.hint)
        text = "; ".join(" ".join(part.split()).rstrip(".;") for part in parts)
        # Names from files may hold anything, terminal escapes included.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class MissingDependencyError(DeploykitError):
    """An optional package is not installed."""


class OutputExistsError(DeploykitError):
    """The output path is taken."""


class StorageError(DeploykitError):
    """The file system refused a write."""


class ArtifactError(DeploykitError):
    """An artifact directory is incomplete, changed since it was written, or of an unknown schema version."""


class DataError(DeploykitError):
    """A dataset or a feed does not fit."""


class SourceError(DeploykitError):
    """The source of an export cannot be found, read or built."""


class ModelError(DeploykitError):
    """A model file is corrupt, unsafe or invalid."""


class ExportError(DeploykitError):
    """A source that works in its framework could not be turned into ONNX."""


class OptionError(ExportError):
    """An option of the export that cannot be read, or that contradicts the source."""


class TimeLimitError(ExportError):
    """A way to ONNX took longer than it may."""


class ContractError(DeploykitError):
    """A model does not fit the runtime that `--for` names, or nothing is known about that runtime."""


class ParityError(DeploykitError):
    """Outputs differ from the reference by more than the tolerance."""


class UnverifiableError(ParityError):
    """Outputs do not react to inputs, so that equal outputs prove nothing."""


class AccuracyError(ParityError):
    """A quantized model misses the accuracy that was asked for, or does not decide by its inputs any more."""


class DeviceError(DeploykitError):
    """A runtime, provider or device is unknown or cannot be had."""


class InferenceError(DeploykitError):
    """A runtime failed while it loaded or ran a model."""


class OptimizationError(DeploykitError):
    """An optimization step could not be applied."""


class SpeedError(DeploykitError):
    """A quantized model is not faster than its parent where it was asked to be."""


class BenchmarkError(DeploykitError):
    """A measurement could not be made."""


class SearchError(DeploykitError):
    """A search cannot be made, or found nothing that may be used."""


class PackageError(DeploykitError):
    """A bundle cannot be made for a serving target, or a bundle on disk is not what it has to be."""


class WorkerError(DeploykitError):
    """A process that did a job for us died, or could not be had."""


class JobTimeoutError(WorkerError):
    """A job took longer than it may."""


class PluginError(DeploykitError):
    """A step of another distribution does not load, fails, or is not what a step of its kind has to be."""


class RecipeError(DeploykitError):
    """A recipe is malformed."""


def first_line(exc: BaseException, limit: int = 300) -> str:
    """The first non-empty line of an exception's message, with its type, for use inside an error of ours."""
    text = next((line.strip() for line in str(exc).splitlines() if line.strip()), "")
    line = f"{type(exc).__name__}: {text}" if text else type(exc).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."


def storage_error(exc: OSError, path: object) -> StorageError | None:
    """Translate an OSError of a write below ``path``; None where it is no storage failure."""
    if exc.errno not in _STORAGE_ERRNOS:
        return None
    hints = {
        errno.ENOSPC: "free some space or choose another -o",
        errno.EDQUOT: "free some space or choose another -o",
        errno.EFBIG: "raise the file size limit (ulimit -f) or choose another -o",
    }
    reason = exc.strerror or str(exc)
    return StorageError(
        f"cannot write {path}: {reason}",
        hint=hints.get(exc.errno or 0, "choose an -o that you may write to") + "; nothing was left behind",
    )
