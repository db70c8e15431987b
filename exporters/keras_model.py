"""Keras 3 models: `.keras` files and what factories return, under the TensorFlow or the torch backend.

TensorFlow is taken where it is installed and nobody chose: through tf2onnx, recurrent layers keep their free sequence
length. Under the torch backend (no TensorFlow needed) a Keras model is a torch module, and goes the way of one; its
recurrent layers are Python loops there, so that their length is fixed.
"""

from __future__ import annotations

import inspect
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import ValueRange, generate
from deploykit.errors import SourceError, first_line
from deploykit.exporters.base import ExportOptions, Source, check_archive
from deploykit.exporters.shapes import plan_inputs
from deploykit.exporters.tensorflow_graph import import_tensorflow
from deploykit.exporters.tensorflow_source import Callee, TensorFlowSource, declared
from deploykit.extras import available, require
from deploykit.specs import Array, TensorSpec


def open_keras_file(path: Path, options: ExportOptions) -> Source:
    """Load a `.keras` file in safe mode: no Lambda layer, no code out of the file.

    Raises:
        SourceError: Damaged, with code inside, or with classes that only the user's program has.
    """
    check_archive(path, "Keras 3's model.save")
    keras = _import_keras()
    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as exc:
        raise _not_loaded(path, exc) from exc
    return open_keras_model(model, options, str(path))


def _not_loaded(path: Path, exc: Exception) -> SourceError:
    if not zipfile.is_zipfile(path):  # Keras says that it is not there
        return SourceError(f"{path} is no zip archive", expected="a file written by Keras 3's model.save")
    text = str(exc)
    factory = "write a factory that builds the model and calls load_weights, and export file.py:factory"
    if "ambda" in text or "safe_mode" in text or "unsafe" in text.lower():
        return SourceError(f"{path} holds a Lambda layer, which is code that loading would run", hint=factory)
    if "Could not locate class" in text or "register_keras_serializable" in text:
        name = text.partition("Could not locate class '")[2].partition("'")[0]
        return SourceError(f"{path} holds the class {name or '?'}, which Keras does not know", hint=factory)
    return SourceError(f"cannot read {path} ({first_line(exc)})", expected="a file written by Keras 3's model.save")


def is_keras_model(value: Any) -> bool:
    """Whether it is a Keras 3 model; Keras is not imported for the answer."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(value, keras.Model)


def _import_keras() -> Any:
    chosen = "KERAS_BACKEND" in os.environ or (Path.home() / ".keras" / "keras.json").is_file()
    if "keras" not in sys.modules and not chosen:
        os.environ["KERAS_BACKEND"] = "tensorflow" if available("tensorflow") or not available("torch") else "torch"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if os.environ.get("KERAS_BACKEND") == "tensorflow":
        import_tensorflow()
    return require("keras", extra="keras")


def open_keras_model(model: Any, options: ExportOptions, label: str, example: Any = None) -> Source:
    """A built model.

    Args:
        model: A Functional or built Sequential model; with an example, any other.
        options: What the user asked for.
        label: What the user called the source.
        example: An array, or several in the order or by the names of the inputs; None to make some up.

    Raises:
        SourceError: Not built and without an example, string inputs, or another backend.
    """
    keras = _import_keras()
    if not getattr(model, "inputs", None):
        model = _with_inputs(keras, model, options, label, example)
    flat = keras.tree.flatten(model.inputs)
    inputs = tuple(declared(t.name, keras.backend.standardize_dtype(t.dtype), t.shape, label) for t in flat)
    if len({s.name for s in inputs}) < len(inputs):
        inputs = tuple(TensorSpec(f"{s.name}_{i}", s.dtype, s.shape) for i, s in enumerate(inputs))
    feeds = None if example is None else _by_name(example, inputs, label)
    structure = getattr(model, "_inputs_struct", None)
    structure = flat[0] if structure is None and len(flat) == 1 else flat if structure is None else structure

    def call(*tensors: Any) -> list[Any]:
        return list(keras.tree.flatten(model(keras.tree.pack_sequence_as(structure, list(tensors)), training=False)))

    ranges = _ranges(model, inputs)
    backend = keras.backend.backend()
    if backend == "tensorflow":
        callee = Callee(inputs, _output_names(model, keras), call, ranges)
        return TensorFlowSource(callee, options, label, "keras", feeds)
    if backend == "torch":
        return _torch_source(model, inputs, _output_names(model, keras), call, ranges, options, label, feeds)
    raise SourceError(f"{label}: Keras runs on {backend}", expected="KERAS_BACKEND=tensorflow or torch")


def _with_inputs(keras: Any, model: Any, options: ExportOptions, label: str, example: Any) -> Any:
    """A model of one layer, the given model, with the inputs that the example shows.

    A subclassed model knows no inputs, not even after it was called.

    Raises:
        SourceError: There is no example, or Keras cannot follow `call` with symbolic inputs.
    """
    if example is None:
        raise SourceError(
            f"{label}: the Keras model has no inputs yet",
            hint="let the factory return (model, example), or build the model with keras.Input",
        )
    takes = [p for p in inspect.signature(model.call).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in takes] or ["input"]
    needed = [p.name for p in takes if p.default is p.empty]
    values = example if isinstance(example, tuple | list | Mapping) else [example]
    # Several arrays are several arguments where `call` cannot do with one, else one argument that holds them.
    if isinstance(example, Mapping):
        arrays = {str(name): value for name, value in example.items()}
        spread = set(needed) <= set(arrays) <= set(named)
    else:
        spread = len(values) == 1 or 1 < len(needed) <= len(values) <= len(named)
        base = named if spread else [f"{named[0]}_{i}" for i in range(len(values))]
        arrays = dict(zip(base, values, strict=False))
    given = {n: np.asarray(v.detach().cpu() if hasattr(v, "detach") else v) for n, v in arrays.items()}
    real = keras.config.floatx()
    symbols = {
        s.name: keras.Input(
            batch_shape=[None if isinstance(d, str) else d for d in s.shape or ()],
            dtype=real if s.dtype == "float64" else s.dtype,
            name=s.name,
        )
        for s in plan_inputs(given, options)
    }
    held = symbols if isinstance(example, Mapping) else list(symbols.values())
    try:
        return keras.Model(held, model(**symbols) if spread else model(held))
    except Exception as exc:
        raise SourceError(
            f"{label}: Keras cannot follow the model's call with symbolic inputs ({first_line(exc)})",
            hint="use keras.ops in it, or build the model with keras.Input",
        ) from exc


def _by_name(example: Any, inputs: tuple[TensorSpec, ...], label: str) -> dict[str, Array]:
    if isinstance(example, Mapping):
        missing = [s.name for s in inputs if s.name not in example]
        if missing:
            raise SourceError(
                f"the example of {label} lacks {missing[0]!r}", expected=", ".join(s.name for s in inputs)
            )
        values = [example[s.name] for s in inputs]
    else:
        values = list(example) if isinstance(example, tuple | list) else [example]
    if len(values) != len(inputs):
        raise SourceError(f"the example of {label} has {len(values)} inputs", expected=str(len(inputs)))
    arrays = [np.asarray(v.detach().cpu() if hasattr(v, "detach") else v) for v in values]
    narrow = {s.name: a.astype(s.dtype) if a.dtype.kind == np.dtype(s.dtype).kind else a
              for s, a in zip(inputs, arrays, strict=True)}  # fmt: skip
    return narrow


def _output_names(model: Any, keras: Any) -> tuple[str, ...]:
    """Keys of a dictionary of outputs, else `output`, or the layers' names where there are several."""
    outputs = getattr(model, "_outputs_struct", None)
    flat = keras.tree.flatten(model.outputs if outputs is None else outputs)
    if isinstance(outputs, Mapping) and len(flat) == len(outputs):
        return tuple(sorted(outputs))
    if len(flat) == 1:
        return ("output",)
    names = list(getattr(model, "output_names", ()))
    return tuple(names) if len(set(names)) == len(flat) else tuple(f"output_{i}" for i in range(len(flat)))


def _ranges(model: Any, inputs: tuple[TensorSpec, ...]) -> dict[str, ValueRange]:
    """Token ids below the smallest table; pixels where the model itself scales them."""
    found: dict[str, ValueRange] = {}
    layers = list(model._flatten_layers())
    tables = [layer.input_dim for layer in layers if type(layer).__name__ == "Embedding"]
    scales = [layer for layer in layers if type(layer).__name__ == "Rescaling" and np.ndim(layer.scale) == 0]
    for spec in inputs:
        if spec.dtype in ("int32", "int64") and tables:
            found[spec.name] = ValueRange(0, min(tables) - 1)
        elif spec.dtype.startswith("float") and len(spec.shape or ()) == 4 and scales and scales[0].scale:
            scale, offset = float(scales[0].scale), float(np.mean(scales[0].offset))
            middle = -offset / scale if offset else 0.5 / scale
            found[spec.name] = ValueRange(middle - 0.25 / abs(scale), middle + 0.25 / abs(scale))
    return found


def _torch_source(
    model: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[str, ...], call: Any,
    ranges: dict[str, ValueRange], options: ExportOptions, label: str, feeds: dict[str, Array] | None,
) -> Source:  # fmt: skip
    """The model as a torch module with named tensors."""
    torch = require("torch", extra="torch")
    from deploykit.exporters.pytorch import Call, TorchSource

    class Flat(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            return dict(zip(outputs, call(*tensors), strict=True))

    sizes = {"batch": 2, "height": 64, "width": 64} | dict(options.dims)
    full = {s: sizes.get(s, 16) for spec in inputs for s in spec.symbols}
    data = "generated" if feeds is None else "example"
    examples = generate(inputs, full, ranges=ranges) if feeds is None else feeds
    return TorchSource(
        Flat(), examples, Call(tuple(s.name for s in inputs), len(inputs), {}), options, label,
        specs=None if options.dynamic or options.inputs else inputs, ranges=ranges, data=data, kind="keras",
    )  # fmt: skip
