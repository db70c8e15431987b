"""scikit-learn estimators and pipelines: from a factory, or a `.skops` file.

The reference is the estimator's own `predict` and `predict_proba` (else `decision_function`, `transform`) on the rows
as the user has them; the graph gets the same rows in its own precision. So a threshold that flips because float32
rounds is a failure of the float32 graph, and the float64 graph is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.errors import ExportError, OptionError, SourceError, first_line
from deploykit.exporters.base import DEFAULT_OPSET, Case, ExportOptions, Source, Way, check_archive
from deploykit.exporters.foreign_onnx import finish
from deploykit.exporters.shapes import observed_outputs, parse_input, plan_inputs
from deploykit.exporters.sklearn_convert import as_wanted, convert
from deploykit.exporters.sklearn_table import MATRIX, Table, made_up_table, ranges_of, table_of, table_of_data
from deploykit.extras import require, version_of
from deploykit.specs import Array, Signature, TensorSpec

if TYPE_CHECKING:
    import onnx

_FLOAT32, _FLOAT64 = "skl2onnx", "skl2onnx in float64"
_CASE_ROWS = (1, 3, 5)
_MANY_ROWS = 1024

# Parts of scikit-learn's own estimators that skops does not trust by itself. Restoring one calls no code that the file
# brings; a crafted tree can still point outside of its own arrays, which crashes the process.
_TRUSTED = frozenset(
    {
        "sklearn.tree._tree.Tree",
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
        "sklearn.utils._bunch.Bunch",
        "sklearn.calibration._CalibratedClassifier",
        "sklearn.calibration._SigmoidCalibration",
        *(f"sklearn.gaussian_process.kernels.{k}" for k in ("ConstantKernel", "Product", "RBF", "Sum", "WhiteKernel")),
    }
)


def open_skops(path: Path, options: ExportOptions) -> Source:
    """Load a `.skops` file, without running code that it brings.

    Raises:
        SourceError: Damaged, or it holds types that nobody vouched for.
    """
    io = require("skops.io", extra="sklearn")
    check_archive(path, "skops.io.dump")
    try:
        unknown = io.get_untrusted_types(file=path)
    except Exception as exc:
        raise SourceError(
            f"cannot read {path} ({first_line(exc)})", expected="a file written by skops.io.dump"
        ) from exc
    strange = [name for name in unknown if name not in _TRUSTED]
    if strange:
        raise SourceError(
            f"{path} holds types that are not trusted: {', '.join(strange[:8])}",
            hint="if you trust them, let a factory call skops.io.load(FILE, trusted=[...]), and export file.py:make",
        )
    try:
        estimator = io.load(path, trusted=unknown)
    except Exception as exc:
        raise SourceError(
            f"cannot read {path} ({first_line(exc)})",
            expected=f"a file written with this scikit-learn ({version_of('scikit-learn')})",
        ) from exc
    if not is_estimator(estimator):
        raise SourceError(f"{path} holds {type(estimator).__name__}", expected="a fitted scikit-learn estimator")
    return SklearnSource(estimator, options, str(path))


def is_estimator(value: Any) -> bool:
    """Whether it is a scikit-learn estimator; scikit-learn is not imported for the answer."""
    return not isinstance(value, type) and any(
        (base.__module__, base.__qualname__) == ("sklearn.base", "BaseEstimator") for base in type(value).__mro__
    )


class SklearnSource(Source):
    """A fitted estimator.

    Args:
        estimator: Fitted.
        options: What the user asked for.
        label: What the user called the source.
        example: Rows, as it was trained on them; None where `--data` or made-up rows have to do.
    """

    kind = "scikit-learn"

    def __init__(self, estimator: Any, options: ExportOptions, label: str, example: Any = None) -> None:
        self.label = label
        self._estimator = estimator
        self._options = options
        self._refuse(options)
        asked = [parse_input(text) for text in options.inputs]
        if options.data:
            table, self.data = table_of_data(options.data, estimator, label), options.data
        elif example is not None:
            table, self.data = table_of(example, estimator, label), "example"
        else:
            table, self.data = made_up_table(estimator, asked[0][1] if asked else None, label), "generated"
        reals = [a for a in table.arrays.values() if a.dtype.kind in "biuf"]
        self._double_only = any(spec.dtype == "float64" for spec, _ in asked)
        self._has_reals = any(a.dtype.kind == "f" for a in reals) or MATRIX in table.arrays and bool(reals)
        self._columns = not set(table.arrays) <= {MATRIX, "text"}
        first = self._ways()[0]
        self.ranges = ranges_of(table.arrays)
        inputs = plan_inputs(_feeds(table, first), options)
        strange = [s for s in inputs if any(isinstance(d, str) for d in (s.shape or ())[1:])]
        if strange:
            raise ExportError(
                f"--dynamic names an axis of features of {strange[0].name!r}", expected="axis 0, the rows"
            )
        self._dynamic = any(s.symbols for s in inputs)
        self._symbol = next((s.symbols[0] for s in inputs if s.symbols), "batch")
        self._outputs = _Outputs(estimator, label)
        self._picked = self._pick(table)
        self._cases: dict[str, tuple[Case, ...]] = {}
        self.cases = self.cases_for(Way(first, self._dynamic))
        self.signature = self._signature(Way(first, self._dynamic))
        self.notes = self._outputs.notes

    def _refuse(self, options: ExportOptions) -> None:
        validation = require("sklearn.utils.validation", extra="sklearn")
        exceptions = require("sklearn.exceptions", extra="sklearn")
        if options.way != "auto":
            raise OptionError(f"--exporter {options.way} is for PyTorch", hint="leave it out")
        try:
            validation.check_is_fitted(self._estimator)
        except exceptions.NotFittedError as exc:
            name = type(self._estimator).__name__
            raise SourceError(f"{self.label}: the {name} is not fitted", hint="call fit before it is exported") from exc
        except TypeError as exc:
            raise SourceError(f"{self.label} is no estimator ({first_line(exc)})") from exc

    def _pick(self, table: Table) -> list[tuple[dict[str, int], Table, dict[str, Array]]]:
        """Rows for every case, with the estimator's answers: few, so that batch 1 is among them, and many."""
        rng = np.random.default_rng(0)
        count = len(table)
        order = _spread_labels(self._outputs.of(self._estimator, table), rng.permutation(count))
        if not self._dynamic:
            picks = [np.arange(count), *(rng.choice(count, count) for _ in range(3))]
        else:
            picks, start = [], 0
            for rows in _CASE_ROWS:
                picks.append(np.take(order, range(start, start + rows), mode="wrap"))
                start += rows
            picks.append(order[:_MANY_ROWS])
        found = []
        for index in picks:
            part = table.take(index)
            sizes = {self._symbol: len(index)} if self._dynamic else {}
            found.append((sizes, part, self._outputs.of(self._estimator, part)))
        return found

    def _ways(self) -> tuple[str, ...]:
        return (_FLOAT64,) if self._double_only else (_FLOAT32, _FLOAT64) if self._has_reals else (_FLOAT32,)

    @property
    def ways(self) -> tuple[Way, ...]:
        """float32 first; float64 where rounding changes what is predicted, or where `--input` asks for it."""
        return tuple(Way(name, self._dynamic) for name in self._ways())

    def cases_for(self, way: Way) -> tuple[Case, ...]:
        """The same rows and answers in the precision of ``way``."""
        if way.name not in self._cases:
            real = np.float32 if way.name == _FLOAT32 else np.float64
            self._cases[way.name] = tuple(
                Case(
                    sizes,
                    _feeds(part, way.name),
                    {n: a.astype(real) if a.dtype.kind == "f" else a for n, a in answers.items()},
                )
                for sizes, part, answers in self._picked
            )
        return self._cases[way.name]

    def _signature(self, way: Way) -> Signature:
        cases = self.cases_for(way)
        rows: int | str = self._symbol if self._dynamic else len(next(iter(cases[0].feeds.values())))
        inputs = tuple(
            TensorSpec(n, "string" if a.dtype.kind == "O" else a.dtype.name, (rows, *a.shape[1:]))
            for n, a in cases[0].feeds.items()
        )
        return Signature(inputs, observed_outputs(cases))

    def write(self, way: Way, target: Path, opset: int | None) -> None:
        """Convert, name the outputs, and fix declared shapes and types."""
        wanted = self._signature(way)
        model: onnx.ModelProto = convert(self._estimator, wanted.inputs, self._columns, opset or DEFAULT_OPSET)
        made = [value.name for value in model.graph.output]
        if len(made) < len(wanted.outputs):
            raise ExportError(f"skl2onnx gives the outputs {', '.join(made)}", expected=str(wanted.outputs[-1]))
        taken = as_wanted(model, dict(zip(made, wanted.outputs, strict=False)))
        finish(model, [s.name for s in wanted.inputs], taken, wanted, target)

    def tools(self) -> dict[str, str]:
        """scikit-learn, skl2onnx and onnx."""
        return {name: v for name in ("scikit-learn", "skl2onnx", "onnx") if (v := version_of(name))}


def _feeds(table: Table, way: str) -> dict[str, Array]:
    """The table as a graph takes it: a matrix of any numbers as reals, columns each in its own kind."""
    real = np.dtype(np.float32 if way == _FLOAT32 else np.float64)
    found = {}
    for name, array in table.arrays.items():
        if array.dtype.kind == "f" or (name == MATRIX and array.dtype.kind in "biu"):
            found[name] = array.astype(real)
        elif array.dtype.kind in "iu":
            found[name] = array.astype(np.int64)
        else:
            found[name] = array
    return found


def _spread_labels(answers: dict[str, Array], order: Array) -> Array:
    """Rows in ``order``, but other labels stand first in the first cases, so that a constant output shows."""
    labels = answers.get("label")
    if labels is None:
        return order
    _, firsts = np.unique(labels.ravel()[order], return_index=True)
    leads = [order[i] for i in firsts]
    rest = [i for i in order if i not in set(leads)]
    spare = leads[len(_CASE_ROWS) :]
    arranged: list[int] = []
    for number, rows in enumerate(_CASE_ROWS):
        arranged.append(leads[number % len(leads)])
        arranged += rest[: rows - 1]
        rest = rest[rows - 1 :]
    return np.array(arranged + rest + spare, dtype=np.int64)


class _Outputs:
    """Which of the estimator's methods are the outputs.

    Args:
        estimator: Fitted.
        label: For messages.
    """

    def __init__(self, estimator: Any, label: str) -> None:
        base = require("sklearn.base", extra="sklearn")
        self.notes: tuple[str, ...] = ()
        self._label = label
        if base.is_classifier(estimator):
            self._methods = {"label": "predict", **self._scores(estimator)}
        elif base.is_regressor(estimator):
            self._methods = {"prediction": "predict"}
        elif base.is_outlier_detector(estimator) and hasattr(estimator, "predict"):
            self._methods = {"label": "predict", "scores": "decision_function"}
        elif hasattr(estimator, "predict"):
            self._methods = {"label": "predict"} | ({"scores": "transform"} if hasattr(estimator, "transform") else {})
        elif hasattr(estimator, "transform"):
            self._methods = {"transformed": "transform"}
        else:
            raise SourceError(
                f"{label}: {type(estimator).__name__} neither predicts nor transforms", expected="predict or transform"
            )

    def _scores(self, estimator: Any) -> dict[str, str]:
        if hasattr(estimator, "predict_proba"):
            return {"probabilities": "predict_proba"}
        if hasattr(estimator, "decision_function"):
            if len(estimator.classes_) > 2:
                return {"scores": "decision_function"}
            self.notes = ("the model has no predict_proba; of two classes, the output is the label only",)
        return {}

    def of(self, estimator: Any, table: Table) -> dict[str, Array]:
        """The estimator's answers, reals in float64.

        Raises:
            SourceError: It does not take the rows, or predicts several targets.
        """
        found: dict[str, Array] = {}
        for name, method in self._methods.items():
            try:
                value = getattr(estimator, method)(table.rows)
            except Exception as exc:
                raise SourceError(
                    f"{self._label}: {method} does not take the rows ({first_line(exc)})",
                    expected="example rows like those that it was fitted on",
                ) from exc
            value = value.toarray() if hasattr(value, "toarray") else value
            if isinstance(value, list) or (name == "label" and np.ndim(value) != 1):
                raise SourceError(f"{self._label} predicts several labels a row", hint="export one classifier a target")
            found[name] = _as_output(np.asarray(value), name)
        if "scores" in found and self._methods["scores"] == "decision_function" and "label" in found:
            outlier = found["scores"].shape[1:] == (1,)
            found["label"] = found["label"].reshape(-1, 1) if outlier else found["label"]
        return found


def _as_output(value: Array, name: str) -> Array:
    """As skl2onnx shapes it: labels [rows] as integers or strings, everything else [rows, columns]."""
    if name == "label":
        if value.dtype.kind in "OUS":
            return value.astype(str).astype(object)
        return value.astype(np.int64)
    return value.reshape(len(value), -1).astype(np.float64)
