"""From the words on the command line to a loaded source."""

from __future__ import annotations

import math
from pathlib import Path

from deploykit.artifact import is_artifact
from deploykit.errors import ExportError, OptionError, SourceError
from deploykit.exporters.base import MIN_OPSET, ExportOptions, OnnxRunner, Source, Way
from deploykit.exporters.plugged import open_plugged
from deploykit.exporters.shapes import parse_input, read_dynamic
from deploykit.exporters.torch_files import SUFFIXES, refusal
from deploykit.extras import require

WAYS = ("auto", "torch.export", "torchscript")
KINDS = (
    "file.py:factory, package.module:factory, a .pt2, .keras, .tflite, .skops or .onnx file, a Hugging Face model "
    "directory, or a SavedModel directory (DIR or DIR:signature)"
)
_FACTORY = "write a factory that builds the model and loads its weights, and export file.py:factory"
_KERAS = "python -c \"import keras; keras.models.load_model('OLD.h5').save('NEW.keras')\""
_REFUSED = {
    **dict.fromkeys(SUFFIXES, f"pickled weights do not hold the model's code; {_FACTORY}"),
    ".pkl": f"unpickling runs whatever code the file holds; {_FACTORY}",
    ".joblib": f"unpickling runs whatever code the file holds; {_FACTORY}",
    ".safetensors": f"weights alone do not hold the model's code; give the directory with config.json, or {_FACTORY}",
    ".h5": f"the old format stores code unchecked; if you trust the file, convert it: {_KERAS}",
    ".hdf5": f"the old format stores code unchecked; if you trust the file, convert it: {_KERAS}",
    ".py": "name the function in it: file.py:factory",
}


def open_parts(source: str, options: ExportOptions, run_onnx: OnnxRunner) -> dict[str, Source]:
    """Load a source and run it for its reference outputs.

    Args:
        source: A factory, a file or a directory; see `export`.
        options: What the user asked for.
        run_onnx: Runs an imported ONNX file without optimizations.

    Returns:
        The graphs that it becomes, by name: one without a name, or for example "encoder" and "decoder".

    Raises:
        SourceError: Not found, not loadable, or it does not accept its own example inputs.
        ModelError: An ONNX file that is corrupt or unsafe.
        DataError: Options or data that contradict the model.
    """
    path = Path(source)
    if path.is_dir() and (path / "config.json").is_file() and not is_artifact(path):
        from deploykit.exporters.huggingface import open_model_directory

        _check_options(options)
        return open_model_directory(path, options)
    for name, value in (("--task", options.task), ("--part", options.part)):
        if value is not None:
            raise OptionError(f"{name} applies to Hugging Face model directories", hint=f"leave {name} out")
    return {"": _open(source, options, run_onnx)}


def open_source(source: str, options: ExportOptions, run_onnx: OnnxRunner) -> Source:
    """Load a source that becomes one graph; see `open_parts`.

    Raises:
        OptionError: It becomes several, and `ExportOptions.part` names none of them.
    """
    parts = open_parts(source, options, run_onnx)
    if len(parts) > 1:
        raise OptionError(
            f"{source} becomes {len(parts)} graphs: {', '.join(parts)}", hint=f"--part {next(iter(parts))}"
        )
    return next(iter(parts.values()))


def _check_options(options: ExportOptions) -> None:
    if options.way not in WAYS:
        raise OptionError(f"unknown exporter {options.way!r}", expected=" or ".join(WAYS))
    if options.opset is not None and options.opset < MIN_OPSET:
        raise OptionError(f"opset {options.opset}", expected=f"{MIN_OPSET} or newer", hint="leave --opset out")
    if options.opset is not None and options.opset > (known := _newest_opset()):
        raise OptionError(f"opset {options.opset}", expected=f"{MIN_OPSET} to {known}", hint="leave --opset out")
    if options.timeout_s is not None and not 0 < options.timeout_s < math.inf:
        raise OptionError(f"a time limit of {options.timeout_s} s", expected="a positive number of seconds")
    read_dynamic(options.dynamic)
    for text in options.inputs:
        parse_input(text)


def _newest_opset() -> int:
    """The newest that the installed onnx knows."""
    return int(require("onnx.defs").onnx_opset_version())


def _open(source: str, options: ExportOptions, run_onnx: OnnxRunner) -> Source:
    """One graph."""
    _check_options(options)
    path = Path(source)
    if (path / "saved_model.pb").is_file() and not is_artifact(path):
        from deploykit.exporters.tensorflow_savedmodel import open_saved_model

        return open_saved_model(path, options)
    if path.is_dir():
        if not is_artifact(path) and (foreign := open_plugged(source, options)) is not None:
            return foreign
        raise _no_source(path)
    named = path.is_file() or ":" not in source  # a colon may stand in a file's name too
    if path.suffix == ".onnx" and named:
        from deploykit.exporters.onnx_file import OnnxSource

        return OnnxSource(path, options, run_onnx)
    if path.suffix == ".pt2" and named:
        from deploykit.exporters.exported_program import ExportedProgramSource

        return ExportedProgramSource(path, options)
    if path.suffix == ".skops" and path.is_file():
        from deploykit.exporters.sklearn_source import open_skops

        return open_skops(path, options)
    if path.suffix == ".keras" and path.is_file():
        from deploykit.exporters.keras_model import open_keras_file

        return open_keras_file(path, options)
    if path.suffix == ".tflite" and path.is_file():
        from deploykit.exporters.tflite_file import TFLiteSource

        return TFLiteSource(path, options)
    if path.suffix in SUFFIXES and path.is_file():
        raise refusal(path)
    if path.suffix in _REFUSED and named:
        where = source if path.exists() else f"{source} (which does not exist)"
        raise SourceError(f"{where} cannot be exported", hint=_REFUSED[path.suffix])
    folder, _, signature = source.rpartition(":")
    if not named and (Path(folder) / "saved_model.pb").is_file():
        from deploykit.exporters.tensorflow_savedmodel import open_saved_model

        return open_saved_model(Path(folder), options, signature)
    if not named:
        from deploykit.exporters.factory import open_factory

        return open_factory(source, options)
    if path.exists():
        if (foreign := open_plugged(source, options)) is not None:
            return foreign
        raise SourceError(f"{source} is of no known kind", expected=KINDS)
    raise SourceError(f"{source} does not exist", expected=KINDS)


def _no_source(path: Path) -> SourceError:
    """Why a directory is none."""
    if is_artifact(path):
        return SourceError(f"{path} is an artifact already", hint=f"go on with it: deploykit simplify -m {path} -o OUT")
    onnx = sorted(path.glob("*.onnx"))
    hint = f"give the file: {onnx[0]}" if onnx else None
    return SourceError(
        f"{path} has no config.json and no saved_model.pb",
        expected="a directory of a Hugging Face model, or a SavedModel",
        hint=hint,
    )


def export(source: Source, way: Way, target: Path, *, opset: int | None = None) -> None:
    """Write ``source`` as ONNX to ``target``.

    Raises:
        ExportError: This way does not lead there; another of `Source.ways` may.
    """
    if source.plugin is None:
        source.write(way, target, opset)
        return
    with source.plugin.blamed(f"wrote ONNX by {way}", ExportError):
        source.write(way, target, opset)
    if not target.is_file():
        raise ExportError(f"the {source.plugin} wrote no ONNX by {way}")
