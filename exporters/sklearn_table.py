"""What a scikit-learn estimator takes: a matrix, a list of texts, or a table with named columns of several dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.data import LABELS, Dataset, ValueRange
from deploykit.errors import DataError, SourceError
from deploykit.extras import require
from deploykit.specs import Array

MATRIX = "X"
TEXT = "text"
_MADE_UP_ROWS = 512
_MAX_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Table:
    """Rows, as the estimator was trained on them, and as named tensors.

    Attributes:
        rows: What the estimator is called with: an ndarray, a DataFrame, or a list of strings.
        arrays: The same values as tensors with the rows along the first axis: `X` [rows, features], `text` [rows], or
            one [rows, 1] a column.
    """

    rows: Any
    arrays: dict[str, Array]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def take(self, index: Array) -> Table:
        """Some of the rows."""
        rows = self.rows
        if hasattr(rows, "iloc"):
            part = rows.iloc[index]
        elif isinstance(rows, list):
            part = [rows[i] for i in index]
        else:
            part = rows[index]
        return Table(part, {name: array[index] for name, array in self.arrays.items()})


def table_of(example: Any, estimator: Any, label: str) -> Table:
    """A table out of example rows.

    Args:
        example: An array or nested list [rows, features], a pandas DataFrame, or strings.
        estimator: Fitted; a ColumnTransformer in front takes named columns.
        label: For messages.

    Raises:
        SourceError: No rows, missing strings, or of another kind.
    """
    named = hasattr(example, "columns") and hasattr(example, "iloc")
    if named and (used := used_columns(estimator)):
        missing = [name for name in used if name not in list(example.columns)]
        if missing:
            raise SourceError(f"the example of {label} has no column {missing[0]!r}", expected=", ".join(used))
        return Table(example, {str(name): _column(example[name].to_numpy(), str(name), label) for name in used})
    if named:
        numbers = all(kind.kind in "biuf" for kind in example.dtypes)
        array = example.to_numpy(dtype=np.float64) if numbers else example.to_numpy()
    elif isinstance(example, str):
        raise SourceError(f"the example of {label} is one string", expected="a list of strings")
    else:
        array = example.toarray() if hasattr(example, "toarray") else np.asarray(example)
    if not array.size or array.ndim not in (1, 2):
        raise SourceError(
            f"the example of {label} has shape {list(array.shape)}", expected="rows of features, or texts"
        )
    if array.dtype.kind in "OUS":
        array = _strings(array, label)
        if array.ndim == 1:
            texts = list(array)
            return Table(texts, {TEXT: array})
        return Table(example if named else array, {MATRIX: array})
    if array.ndim == 1:
        raise SourceError(f"the example of {label} is one row", expected="rows of features, [rows, features]")
    return Table(example if named else array, {MATRIX: array})


def table_of_data(source: str, estimator: Any, label: str) -> Table:
    """A table out of a dataset: `X`, `text`, or one array a column.

    Raises:
        DataError: It lacks what the estimator takes.
    """
    arrays = {k: v for k, v in Dataset.open(source).head(_MAX_ROWS).items() if k != LABELS}
    used = used_columns(estimator)
    if not used:
        name = next((n for n in (MATRIX, TEXT) if n in arrays), next(iter(arrays), ""))
        if not name or (len(arrays) > 1 and name not in (MATRIX, TEXT)):
            raise DataError(f"{source} holds {', '.join(arrays) or 'no inputs'}", expected=f"{MATRIX} or {TEXT}")
        array = arrays[name]
        flat = array.reshape(-1) if array.dtype.kind in "OUS" and array.ndim == 2 and array.shape[1] == 1 else array
        return table_of(flat, estimator, label)
    missing = [name for name in used if name not in arrays]
    if missing:
        raise DataError(f"{source} has no column {missing[0]!r}", expected=", ".join(map(str, used)))
    pandas = require("pandas", extra="sklearn")
    given = [n for n in getattr(estimator, "feature_names_in_", used) if n in arrays]
    columns = {name: _plain(arrays[name].reshape(len(arrays[name]))) for name in given}
    return table_of(pandas.DataFrame(columns), estimator, label)


def made_up_table(estimator: Any, limits: ValueRange | None, label: str) -> Table:
    """Rows drawn where the estimator's scaler or trees say that the features lie, else from N(0, 1).

    Raises:
        SourceError: The estimator takes something else than a matrix of numbers.
    """
    features = getattr(estimator, "n_features_in_", None)
    if features is None or used_columns(estimator):
        kind = "named columns" if features is not None else "text"
        raise SourceError(
            f"{label} takes {kind}, which cannot be made up",
            hint="give real inputs with --data, or return (estimator, example rows) from the factory",
        )
    middle, spread = np.array(0.0), np.array(1.0)
    if limits is not None:
        middle, spread = np.array((limits.low + limits.high) / 2), np.array((limits.high - limits.low) / 2)
    elif (found := _where_features_lie(estimator, int(features))) is not None:
        middle, spread = found
    rows = np.random.default_rng(0).standard_normal((_MADE_UP_ROWS, int(features))) * spread + middle
    return Table(rows, {MATRIX: rows})


def used_columns(estimator: Any) -> list[Any]:
    """Names of the columns that a ColumnTransformer in front reads, in the table's order; empty without one."""
    compose = require("sklearn.compose", extra="sklearn")
    first = estimator
    while hasattr(first, "steps"):
        first = first.steps[0][1]
    if not isinstance(first, compose.ColumnTransformer) or not hasattr(first, "feature_names_in_"):
        return []
    known = list(first.feature_names_in_)
    used: set[Any] = set()
    for _, transformer, columns in first.transformers_:
        if isinstance(transformer, str) and transformer == "drop":
            continue
        chosen = [columns] if isinstance(columns, str | int) else columns
        if isinstance(chosen, slice):
            used |= set(known[chosen])
        elif len(chosen) and isinstance(chosen[0], bool | np.bool_):
            used |= {name for name, on in zip(known, chosen, strict=True) if on}
        else:
            used |= {name if isinstance(name, str) else known[name] for name in chosen}
    return [name for name in known if name in used]


def _where_features_lie(estimator: Any, features: int) -> tuple[Array, Array] | None:
    """Mean and spread of every feature, out of a scaler in front or the thresholds of trees."""
    first = estimator
    while hasattr(first, "steps"):
        first = first.steps[0][1]
    if getattr(first, "mean_", None) is not None and getattr(first, "scale_", None) is not None:
        return np.asarray(first.mean_), np.asarray(first.scale_)
    if hasattr(first, "data_min_"):
        return (first.data_min_ + first.data_max_) / 2, (first.data_max_ - first.data_min_) / 4
    parts = np.ravel(np.asarray(getattr(first, "estimators_", [first]), dtype=object))
    trees = [part.tree_ for part in parts if hasattr(part, "tree_")]
    if not trees:
        return None
    where = np.concatenate([tree.feature for tree in trees])
    values = np.concatenate([tree.threshold for tree in trees])
    middle, spread = np.zeros(features), np.ones(features)
    for feature in np.unique(where[where >= 0]):
        middle[feature], spread[feature] = values[where == feature].mean(), values[where == feature].std() or 1.0
    return middle, spread


def _column(values: Array, name: str, label: str) -> Array:
    if values.dtype.kind not in "biuf":
        return _strings(np.asarray(values, dtype=object), f"{name!r} of {label}").reshape(-1, 1)
    return values.reshape(-1, 1)


def _plain(values: Array) -> Array:
    return values.astype(object) if values.dtype.kind in "US" else values


def _strings(array: Array, label: str) -> Array:
    wrong = next((value for value in array.ravel() if not isinstance(value, str)), None)
    if wrong is not None:
        raise SourceError(
            f"the example of {label} mixes strings with {type(wrong).__name__} ({wrong!r:.20})",
            expected="strings, or numbers; ONNX has no missing string",
            hint="fill the gaps before the model, with '' for example",
        )
    return np.asarray(array, dtype=object)


def ranges_of(arrays: Mapping[str, Array]) -> dict[str, ValueRange]:
    """Legal values of made-up inputs, as the rows show them."""
    found: dict[str, ValueRange] = {}
    for name, array in arrays.items():
        if array.dtype.kind in "iu":
            found[name] = ValueRange(float(array.min()), float(array.max()))
        elif array.dtype.kind == "f" and np.isfinite(array).any():
            values = array[np.isfinite(array)].astype(np.float64)
            spread = float(values.std()) or 1.0
            found[name] = ValueRange(float(values.mean()) - spread, float(values.mean()) + spread)
    return found
