"""scikit-learn to ONNX with skl2onnx, and what has to be mended on the way.

Found by trial with skl2onnx 1.20, scikit-learn 1.9 and onnx 1.23; test_sklearn.py holds the cases:

- Trees compare `float32(x) <= threshold` in scikit-learn, whatever the input. In a float64 graph skl2onnx feeds them
  float64, and predictions differ (154 instead of 0 on the diabetes data). Here a Cast to float32 stands before them.
- A forest's votes are added in float32 as multiples of 1/n, so that ties go to the wrong class: here whole votes are
  added, and divided behind the trees.
- HistGradientBoosting hands numpy scalars to onnx, which refuses them.
- ONNX Runtime's Imputer knows no float64; there a Where over IsNaN stands for it.
- Text is lowered under the locale en_US.UTF-8, which images do not have; C.UTF-8 is there, and the same for that.
- A word is `\\w\\w+` to scikit-learn, letters of any script; skl2onnx splits at ASCII.
- The scores of a two-class SVC have the wrong sign; where there is no predict_proba, two-class models give labels only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.errors import ExportError, first_line
from deploykit.extras import require
from deploykit.specs import TensorSpec

if TYPE_CHECKING:
    import onnx

# Newer ones are not known to every runtime that people have; skl2onnx writes nothing that needs them.
_ML_OPSET = 3
_TREES = (
    "tree.DecisionTreeClassifier", "tree.DecisionTreeRegressor", "tree.ExtraTreeClassifier", "tree.ExtraTreeRegressor",
    "ensemble.RandomForestClassifier", "ensemble.RandomForestRegressor", "ensemble.ExtraTreesClassifier",
    "ensemble.ExtraTreesRegressor", "ensemble.GradientBoostingClassifier", "ensemble.GradientBoostingRegressor",
    "ensemble.HistGradientBoostingClassifier", "ensemble.HistGradientBoostingRegressor",
)  # fmt: skip
_DEFAULT_WORD = r"(?u)\b\w\w+\b"
_WORD = r"[\p{L}\p{N}_][\p{L}\p{N}_]+"  # RE2's \w is ASCII


def convert(estimator: Any, inputs: Sequence[TensorSpec], columns: bool, opset: int) -> onnx.ModelProto:
    """An ONNX graph of a fitted estimator, with skl2onnx's own names for outputs.

    Args:
        estimator: Fitted.
        inputs: Inputs; float32 or float64 throughout where they are real.
        columns: Whether they are columns of a table.
        opset: Of the default domain.

    Raises:
        ExportError: Without a converter, or of a form that the converter does not know.
    """
    skl2onnx = require("skl2onnx", extra="sklearn")
    types = require("skl2onnx.common.data_types", extra="sklearn")
    kinds = {
        "float32": types.FloatTensorType, "float64": types.DoubleTensorType, "int64": types.Int64TensorType,
        "bool": types.BooleanTensorType, "string": types.StringTensorType,
    }  # fmt: skip
    unknown = [spec for spec in inputs if spec.dtype not in kinds]
    if unknown:
        raise ExportError(f"input {unknown[0]} is of no type that skl2onnx takes", expected=", ".join(kinds))
    initial = [
        (
            s.name,
            kinds[s.dtype]([None if isinstance(d, str) or axis == 0 else d for axis, d in enumerate(s.shape or ())]),
        )
        for s in inputs
    ]
    try:
        model: onnx.ModelProto = skl2onnx.convert_sklearn(
            estimator,
            name="model",  # by default a random one
            initial_types=initial,
            options=_options(estimator),
            target_opset={"": opset, "ai.onnx.ml": _ML_OPSET},
            custom_conversion_functions=_mended_converters(),
        )
    except Exception as exc:
        raise ExportError(f"skl2onnx: {_reason(exc)}", hint="export the part before or behind it") from exc
    _set_locale(model)
    return model


def _set_locale(model: onnx.ModelProto) -> None:
    from onnx import helper

    for node in model.graph.node:
        if node.op_type == "StringNormalizer" and not any(a.name == "locale" and a.s for a in node.attribute):
            node.attribute.append(helper.make_attribute("locale", "C.UTF-8"))


def _reason(exc: BaseException) -> str:
    """The sentence of skl2onnx's long messages that says why."""
    text = str(exc)
    missing = re.search(r"Unable to find a (?:shape calculator|converter) for type '<class '([\w.]+)'>'", text)
    missing = missing or re.search(r"Unable to find (?:a )?(?:shape calculator|converter) for alias '(\w+)'", text)
    return f"there is no converter for {missing[1]}" if missing else first_line(exc, 240)


def _options(estimator: Any) -> dict[int, dict[str, Any]]:
    """Probabilities as a tensor, texts split as scikit-learn splits them; by the id of each part."""
    registry = require("skl2onnx.common._registration", extra="sklearn")
    operators = require("skl2onnx._supported_operators", extra="sklearn")
    found: dict[int, dict[str, Any]] = {}
    for part in parts_of(estimator):
        try:
            known = registry._converter_pool[operators._get_sklearn_operator_name(type(part))].get_allowed_options()
        except (KeyError, RuntimeError, ValueError):  # a part without a converter is named when it is converted
            continue
        chosen: dict[str, Any] = {}
        if "zipmap" in (known or ()) and hasattr(part, "classes_") and not hasattr(part, "steps"):
            chosen["zipmap"] = False
        if "tokenexp" in (known or ()) and getattr(part, "token_pattern", None) == _DEFAULT_WORD:
            chosen["tokenexp"] = _WORD
        if chosen:
            found[id(part)] = chosen
    return found


def parts_of(estimator: Any) -> list[Any]:
    """The estimator and all that it is made of."""
    parts, queue, seen = [], [estimator], set()
    while queue:
        part = queue.pop()
        if isinstance(part, list | tuple):
            queue += part
        elif hasattr(part, "get_params") and not isinstance(part, type) and id(part) not in seen:
            seen.add(id(part))
            parts.append(part)
            inner = ("steps", "transformers_", "transformer_list", "estimators_", "estimator_", "final_estimator_")
            queue += [value for name in inner if (value := getattr(part, name, None)) is not None]
        elif isinstance(part, np.ndarray) and part.dtype == object:
            queue += list(part.ravel())
    return parts


Converter = Callable[..., None]


def _mended_converters() -> dict[type, Converter]:
    registry = require("skl2onnx.common._registration", extra="sklearn")
    operators = require("skl2onnx._supported_operators", extra="sklearn")
    found: dict[type, Converter] = {}
    for path in _TREES:
        module, _, name = path.partition(".")
        kind = getattr(require(f"sklearn.{module}", extra="sklearn"), name, None)
        if kind is not None:
            found[kind] = _mended(registry.get_converter(operators._get_sklearn_operator_name(kind)))
    impute = require("sklearn.impute", extra="sklearn").SimpleImputer
    found[impute] = _mended_imputer(registry.get_converter(operators._get_sklearn_operator_name(impute)))
    return found


def _mended_imputer(converter: Converter) -> Converter:
    """An imputer of float64 out of operators that every runtime has."""

    def convert_imputer(scope: Any, operator: Any, container: Any, **options: Any) -> None:
        from onnx import TensorProto

        types = require("skl2onnx.common.data_types", extra="sklearn")
        fitted = operator.raw_operator
        wide = all(isinstance(v.type, types.DoubleTensorType) for v in operator.inputs)
        gaps = isinstance(fitted.missing_values, float) and np.isnan(fitted.missing_values)
        if not wide or not gaps or fitted.indicator_ is not None or np.isnan(fitted.statistics_).any():
            converter(scope, operator, container, **options)
            return
        name = [scope.get_unique_variable_name(part) for part in ("together", "missing", "fill")]
        source = operator.inputs[0].full_name
        if len(operator.inputs) > 1:
            source = name[0]
            inputs = [v.full_name for v in operator.inputs]
            container.add_node("Concat", inputs, [source], name=scope.get_unique_operator_name("Concat"), axis=1)
        fill = np.asarray(fitted.statistics_, dtype=np.float64)
        container.add_initializer(name[2], TensorProto.DOUBLE, [1, len(fill)], fill.tolist())
        container.add_node("IsNaN", [source], [name[1]], name=scope.get_unique_operator_name("IsNaN"), op_version=13)
        container.add_node(
            "Where", [name[1], name[2], source], [operator.outputs[0].full_name], op_version=16,
            name=scope.get_unique_operator_name("Where"),
        )  # fmt: skip

    return convert_imputer


def _mended(converter: Converter) -> Converter:
    """A tree's converter that always gets float32, and whose attributes are Python's own numbers."""

    def convert_tree(scope: Any, operator: Any, container: Any, **options: Any) -> None:
        from onnx import TensorProto

        casting = require("skl2onnx.common._apply_operation", extra="sklearn")
        types = require("skl2onnx.common.data_types", extra="sklearn")
        plain = _PlainNumbers(container, scope, _votes(operator.raw_operator))
        if not isinstance(operator.inputs[0].type, types.DoubleTensorType):
            converter(scope, operator, plain, **options)
            return
        narrow = scope.get_unique_variable_name("as_float32")
        casting.apply_cast(scope, operator.inputs[0].full_name, narrow, container, to=TensorProto.FLOAT)
        shape = operator.inputs[0].type.shape
        inside = _Operator(operator, _Value(narrow, types.FloatTensorType(shape)), scope, types)
        converter(scope, inside, plain, **options)
        for made, wanted in zip(inside.outputs, operator.outputs, strict=True):
            wide = isinstance(wanted.type, types.DoubleTensorType)
            kind = TensorProto.DOUBLE if wide else None
            if kind is None:
                container.add_node(
                    "Identity", [made.full_name], [wanted.full_name], name=scope.get_unique_operator_name("I")
                )
            else:
                casting.apply_cast(scope, made.full_name, wanted.full_name, container, to=kind)

    return convert_tree


class _Value:
    """A tensor between two nodes, as converters look at it."""

    def __init__(self, name: str, kind: Any) -> None:
        self.full_name = self.onnx_name = self.raw_name = name
        self.type = kind


class _Operator:
    """An operator whose real inputs and outputs are float32."""

    def __init__(self, operator: Any, value: _Value, scope: Any, types: Any) -> None:
        self._operator = operator
        self.inputs = [value]
        self.outputs = [
            _Value(
                scope.get_unique_variable_name("of_tree"),
                types.FloatTensorType(v.type.shape) if isinstance(v.type, types.DoubleTensorType) else v.type,
            )
            for v in operator.outputs
        ]

    @property
    def input_full_names(self) -> list[str]:
        return [v.full_name for v in self.inputs]

    @property
    def output_full_names(self) -> list[str]:
        return [v.full_name for v in self.outputs]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operator, name)


class _PlainNumbers:
    """A container whose nodes get Python's numbers where a converter gives numpy's."""

    def __init__(self, container: Any, scope: Any, votes: int) -> None:
        self._container = container
        self._scope = scope
        self._votes = votes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def add_node(self, op_type: str, inputs: Any, outputs: Any, **attributes: Any) -> Any:
        plain = {k: _plain(v) for k, v in attributes.items()}
        if op_type != "TreeEnsembleClassifier" or not self._votes:
            return self._container.add_node(op_type, inputs, outputs, **plain)
        from onnx import TensorProto

        label, shares = outputs
        whole, two = _whole_votes(plain, self._votes)
        sums = self._scope.get_unique_variable_name("sums")
        self._container.add_node(op_type, inputs, [label, sums], **whole)
        if two:
            last = self._node("Gather", sums, self._constant(TensorProto.INT64, [1], [1]), axis=1)
            number = self._constant(TensorProto.FLOAT, [], [float(self._votes)])
            counts = self._node("Concat", self._node("Sub", number, last), self._node("Add", number, last), axis=1)
            return self._node("Div", counts, self._constant(TensorProto.FLOAT, [], [2.0 * self._votes]), to=shares)
        return self._node("Div", sums, self._constant(TensorProto.FLOAT, [], [float(self._votes)]), to=shares)

    def _constant(self, kind: int, shape: list[int], values: list[Any]) -> str:
        name: str = self._scope.get_unique_variable_name("constant")
        self._container.add_initializer(name, kind, shape, values)
        return name

    def _node(self, op_type: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        name = to or self._scope.get_unique_variable_name(op_type.lower())
        operator = self._scope.get_unique_operator_name(op_type)
        self._container.add_node(op_type, list(inputs), [name], name=operator, **attributes)
        return name


def _votes(estimator: Any) -> int:
    """Number of trees of a classifying forest, whose shares are added; else 0."""
    forest = type(estimator).__name__ in ("RandomForestClassifier", "ExtraTreesClassifier")
    return len(estimator.estimators_) if forest else 0


def _whole_votes(attributes: dict[str, Any], trees: int) -> tuple[dict[str, Any], bool]:
    """Attributes of a TreeEnsembleClassifier whose leaves hold one tree's vote, and whether it is -1..1 of two classes.

    Where there are two classes, skl2onnx writes the share of the second, and the runtime compares the sum with 0.5.
    With votes from -1 to 1 it compares with 0, which a tie reaches exactly; the first class wins, as in scikit-learn.
    """
    weights = np.array(attributes["class_weights"], dtype=np.float64) * trees
    weights = np.where(np.abs(weights - np.round(weights)) < 1e-6, np.round(weights), weights)
    labels = attributes.get("classlabels_int64s") or attributes.get("classlabels_strings") or ()
    two = len(labels) == 2
    return attributes | {"class_weights": (2 * weights - 1 if two else weights).tolist()}, two


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.bool_ | bool):
        return int(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def as_wanted(model: onnx.ModelProto, wanted: Mapping[str, TensorSpec]) -> list[str]:
    """Add what turns skl2onnx's outputs into the wanted ones: a Cast to the precision, a Reshape to plain labels.

    Args:
        model: Changed in place. What it declares may be wrong, so it is not asked.
        wanted: By the name in the graph.

    Returns:
        The names of the tensors to take, in order.
    """
    from onnx import TensorProto, helper

    taken = []
    for name, spec in wanted.items():
        kind = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}.get(spec.dtype)
        if kind is not None:
            node = helper.make_node("Cast", [name], [f"{name}.cast"], to=kind)
        elif len(spec.shape or ()) == 1:
            shape = f"{name}.flat"
            model.graph.initializer.append(helper.make_tensor(shape, TensorProto.INT64, [1], [-1]))
            node = helper.make_node("Reshape", [name, shape], [f"{name}.labels"])
        else:
            taken.append(name)
            continue
        model.graph.node.append(node)
        elem = kind or (TensorProto.STRING if spec.dtype == "string" else TensorProto.INT64)
        model.graph.output.append(helper.make_tensor_value_info(node.output[0], elem, None))
        taken.append(node.output[0])
    return taken
