"""Linear classifiers in JSON, as an exporter.

The format, for files whose names end in `.linear.json`:

    {
      "format": "linear/1",
      "mean": [F numbers],            # of every feature, subtracted first; zeros where it is left out
      "scale": [F numbers],           # what that is divided by; ones where it is left out
      "weights": [[F numbers], ...],  # a row a class, two classes or more
      "bias": [a number a class]
    }

Outputs: `probabilities` [batch, classes], the softmax of `scores` [batch, classes]. The reference is computed by numpy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import Dataset, ValueRange
from deploykit.errors import ExportError, OptionError, SourceError
from deploykit.exporters.base import DEFAULT_OPSET, ExportOptions, Source, Way
from deploykit.exporters.shapes import cases_from_data, make_cases, observed_outputs, plan_inputs
from deploykit.extras import version_of
from deploykit.modelfile import write_model
from deploykit.specs import Array, Feeds, Signature

_SUFFIX = ".linear.json"
_KEYS = {"format", "mean", "scale", "weights", "bias"}


class LinearSource(Source):
    """A file of the format above.

    Args:
        path: The file.
        options: `--dynamic`, `--data` and `--opset` apply.
    """

    kind = "linear-json"

    def __init__(self, path: Path, options: ExportOptions) -> None:
        if options.way != "auto":
            raise OptionError(f"--exporter {options.way} is for PyTorch", hint="leave it out")
        self.label = str(path)
        found = _read(path)
        self._weights, self._bias = found["weights"], found["bias"]
        self._mean, self._scale = found["mean"], found["scale"]
        rng = np.random.default_rng(0)
        example = {"x": (self._mean + self._scale * rng.normal(size=(4, self._mean.size))).astype(np.float32)}
        inputs = plan_inputs(example, options)
        if any(isinstance(dim, str) for dim in (inputs[0].shape or ())[1:]):
            raise OptionError(f"{path} has a fixed number of features", expected="--dynamic x:0=NAME")
        low, high = float((self._mean - 3 * self._scale).min()), float((self._mean + 3 * self._scale).max())
        self.ranges = {"x": ValueRange(low, high)}
        if options.data:
            self.data, self.cases = options.data, tuple(cases_from_data(inputs, Dataset.open(options.data), self.run))
        else:
            cases, notes = make_cases(inputs, example, self.run)
            self.data, self.cases, self.notes = "generated", tuple(cases), tuple(notes)
        self.signature = Signature(inputs, observed_outputs(self.cases))

    @property
    def ways(self) -> tuple[Way, ...]:
        """There is one: the graph is built by hand."""
        return (Way("linear-json", dynamic=True),)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """The classifier in numpy, in double precision."""
        rows = (feeds["x"].astype(np.float64) - self._mean) / self._scale
        scores = rows @ self._weights.T + self._bias
        powers = np.exp(scores - scores.max(1, keepdims=True))
        made = {"probabilities": powers / powers.sum(1, keepdims=True), "scores": scores}
        return {name: array.astype(np.float32) for name, array in made.items()}

    def write(self, way: Way, target: Path, opset: int | None) -> None:
        """Four nodes: Sub, Div, Gemm, Softmax."""
        from onnx import TensorProto, helper, numpy_helper

        def value(name: str) -> Any:
            spec = next(s for s in self.signature if s.name == name)
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(spec.shape or ()))

        constants = {"mean": self._mean, "scale": self._scale, "weights": self._weights, "bias": self._bias}
        graph = helper.make_graph(
            [
                helper.make_node("Sub", ["x", "mean"], ["centred"], name="centre"),
                helper.make_node("Div", ["centred", "scale"], ["scaled"], name="scale_rows"),
                helper.make_node("Gemm", ["scaled", "weights", "bias"], ["scores"], name="classify", transB=1),
                helper.make_node("Softmax", ["scores"], ["probabilities"], name="normalize", axis=1),
            ],
            "linear",
            [value("x")],
            [value("probabilities"), value("scores")],
            [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()],
        )
        opsets = [helper.make_opsetid("", opset or DEFAULT_OPSET)]
        try:
            model = helper.make_model_gen_version(graph, opset_imports=opsets)
        except ValueError as exc:
            raise ExportError(f"onnx knows no opset {opset}", hint="leave --opset out") from exc
        write_model(model, target)

    def tools(self) -> dict[str, str]:
        """Numpy gives the reference, onnx writes the file."""
        return {name: version for name in ("numpy", "onnx") if (version := version_of(name))}


def _read(path: Path) -> dict[str, Array]:
    """The arrays of a file.

    Raises:
        SourceError: It is not of the format.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise SourceError(f"cannot read {path} ({exc})", expected="a file of the format linear/1") from exc
    if not isinstance(found, dict) or found.get("format") != "linear/1" or not set(found) <= _KEYS:
        raise SourceError(f"{path} is not of the format linear/1", expected=f"the keys {', '.join(sorted(_KEYS))}")
    try:
        arrays = {name: np.asarray(found[name], np.float64) for name in _KEYS - {"format"} if name in found}
        classes, features = arrays["weights"].shape
        arrays.setdefault("mean", np.zeros(features))
        arrays.setdefault("scale", np.ones(features))
        wanted = {"weights": (classes, features), "bias": (classes,), "mean": (features,), "scale": (features,)}
        for name, shape in wanted.items():
            if arrays[name].shape != shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}, not {shape}")
    except (KeyError, TypeError, ValueError) as exc:
        raise SourceError(f"{path}: {exc}", expected="weights, bias, mean and scale of matching shapes") from exc
    if classes < 2 or not all(np.isfinite(a).all() for a in arrays.values()) or not arrays["scale"].all():
        raise SourceError(f"{path} describes no classifier", expected="two classes, finite numbers, no scale of 0")
    return arrays


class LinearExporter:
    """What the entry point names."""

    def opens(self, source: str) -> bool:
        """By the name alone."""
        return source.endswith(_SUFFIX) and Path(source).is_file()

    def open(self, source: str, options: ExportOptions) -> Source:
        """Read the file.

        Raises:
            SourceError: It is not of the format.
        """
        return LinearSource(Path(source), options)


exporter = LinearExporter()
