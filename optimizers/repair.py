"""Repair of Q/DQ models that others made: the same numbers, in a form that runtimes run in integer kernels.

Two stages. The first changes no bit: types, shapes of scales, constants, operators that a quantizer implies. It is
proven by running both graphs without any fusion. The second moves, adds or takes away Q/DQ pairs, each within a step of
a scale; its result is compared as quantized models are.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.errors import OptimizationError
from deploykit.graphs import walk
from deploykit.nodes import quantized_ops
from deploykit.optimizers import repair_place as place
from deploykit.optimizers import repair_products as products
from deploykit.optimizers import repair_types as types
from deploykit.optimizers.base import Check, StepResult
from deploykit.optimizers.prepare import infer_shapes, prepare
from deploykit.optimizers.quantize_config import tools
from deploykit.optimizers.repair_pairs import DEQUANTIZE, QUANTIZE, PairEditor
from deploykit.optimizers.rewrite import rewrite
from deploykit.weights import LightModel, open_light, write_light

if TYPE_CHECKING:
    import onnx

_Repair = tuple[Callable[[PairEditor], int], str]
_EXACT: Sequence[_Repair] = (
    (types.to_standard_domain, "{} Q/DQ nodes of com.microsoft written as those of the standard"),
    (types.quantize_weights, "{} weights stored as the codes that a quantizer made of them"),
    (types.turn_weights, "{} weights stored transposed"),
    (types.weights_to_int8, "{} weights from uint8 to int8"),
    (types.activations_to_uint8, "{} activations from int8 to uint8"),
    (types.to_scalars, "{} scales from lists of one to scalars"),
    (types.share_quantizers, "{} quantizers of a tensor that had an equal one"),
    (types.gather_codes, "{} tables dequantized after rows are picked"),
    (place.repeat_behind_moves, "{} pairs before a Flatten or Pad repeated behind it"),
    (products.float_constants, "{} constants of float operators stored in float"),
    (types.drop_implied_clips, "{} Relu or Clip that their quantizer implies"),
)
_MOVED: Sequence[_Repair] = (
    (place.drop_before_clips, "{} pairs before a Relu or Clip that has a quantizer behind it taken away"),
    (place.unsign_positive, "{} tensors without negative numbers given all their codes"),
    (place.one_scale_for_depthwise, "{} activations before depthwise convolutions given one scale, the codes kept"),
    (types.drop_implied_clips, "{} Relu or Clip that their quantizer implies now"),
    (place.quantize_sums, "{} convolutions before a sum quantized"),
    (place.read_codes, "{} convolutions read through their quantizer alone"),
    (products.float_attention, "{} pairs before products of two activations taken away: integers are no faster there"),
    (products.drop_idle_pairs, "{} pairs between float operators taken away"),
    (products.float_constants, "{} constants of float operators stored in float"),
    (products.int32_biases, "{} biases of Gemm stored as int32"),
    (products.fold_factors, "{} factors folded into layer normalizations"),
)

_ROUNDS = 20  # a bound; a transformer by the defaults of onnxruntime needed more than five


@dataclass(frozen=True, slots=True)
class RepairConfig:
    """Repair of a model with Q/DQ pairs.

    Attributes:
        exact: Only what changes no bit of a run without fusion.
    """

    exact: bool = False


def repair(model: Path, config: RepairConfig, target: Path, same_bits: Check | None = None) -> StepResult:
    """Repair a quantized model.

    Args:
        model: ONNX file with Q/DQ pairs.
        config: How far to go.
        target: Where the result goes.
        same_bits: Says why a file does not give the very bits of the model without fusions; None where it does.

    Raises:
        OptimizationError: It is not quantized, or not with Q/DQ pairs.
    """
    with tempfile.TemporaryDirectory(prefix=".repair-", dir=target.parent) as scratch:
        light = open_light(model, Path(scratch))
        _refuse(light.proto)
        made, notes = prepare(light.proto, quantized=True)
        exact = _apply(_EXACT, made, light.folder)
        made = infer_shapes(made)
        if exact and same_bits is not None:
            first = Path(scratch) / "exact"
            first.mkdir()
            _write(LightModel(made, light.folder), first / "model.onnx")
            why = same_bits(first / "model.onnx")
            if why is not None:
                raise OptimizationError(f"the bit-exact repair changed the result ({why})", hint="please report it")
        moved: dict[str, int] = {}
        rewritten: list[str] = []
        if not config.exact:
            moved, rewritten, made = _move(made, light.folder)
        masks, lopsided = _left(made, light.folder)
        changed = bool(exact or moved or rewritten)
        if not changed:
            notes = ["nothing needs repair; the graph is as it was"]
        write_light(LightModel(made, light.folder) if changed else light, target)
        other_bits = same_bits(target) if same_bits is not None and (moved or rewritten) else None
    notes += [f"bit-exact: {text}" for text in exact] + [f"within a step of the scale: {text}" for text in moved]
    notes += [f"within rounding: {text}" for text in rewritten]
    notes += masks + lopsided
    if (moved or rewritten) and same_bits is not None:
        notes.append(
            "without fusions the whole gives " + ("other bits" if other_bits else "the very bits of the model")
        )
    if changed and same_bits is None:
        notes.append("bits were not compared: that needs ONNX Runtime")
    params: dict[str, Any] = {
        "exact_only": config.exact,
        "bit_exact": {text: count for text, count in exact.items()},
        "within_a_step": {text: count for text, count in moved.items()},
        "rewritten": rewritten,
        "bits_compared": bool(exact) and same_bits is not None,
        "all_bits_same": other_bits is None if same_bits is not None else None,
    }
    return StepResult(changed, tuple(notes), params, tools())


def _refuse(model: onnx.ModelProto) -> None:
    """Refuse what has no Q/DQ pairs.

    Raises:
        OptimizationError: It has none.
    """
    kinds = Counter(n.op_type for n in model.graph.node)
    if kinds[QUANTIZE] or kinds[DEQUANTIZE]:
        return
    found = quantized_ops(model)
    if found:
        raise OptimizationError(
            f"the model has no Q/DQ pairs to repair: it is quantized with {', '.join(found[:3])}",
            expected="QuantizeLinear and DequantizeLinear in the main graph",
            hint="start from the floating-point model: deploykit quantize static -m MODEL --data FILE -o DIR",
        )
    raise OptimizationError(
        "the model is not quantized, so there is nothing to repair",
        expected="a model with QuantizeLinear and DequantizeLinear",
        hint="quantize it: deploykit quantize static -m MODEL --data FILE -o DIR",
    )


def _move(model: onnx.ModelProto, folder: Path) -> tuple[dict[str, int], list[str], onnx.ModelProto]:
    """Apply what changes numbers until nothing is left to do, since one repair may clear the way for another."""
    total: Counter[str] = Counter()
    rewritten: list[str] = []
    for _ in range(_ROUNDS):
        done = _count(_MOVED, model, folder)
        notes = rewrite(model)
        model = infer_shapes(model)
        total.update(done)
        rewritten += notes
        if not done and not notes:
            break
    return {text.format(count): count for text, count in total.items()}, rewritten, model


def _apply(repairs: Sequence[_Repair], model: onnx.ModelProto, folder: Path) -> dict[str, int]:
    """Apply repairs in order, in place; what each did, by its note."""
    return {text.format(count): count for text, count in _count(repairs, model, folder).items()}


def _count(repairs: Sequence[_Repair], model: onnx.ModelProto, folder: Path) -> dict[str, int]:
    """Apply repairs in order, in place; how often each applied, by its text."""
    done: dict[str, int] = {}
    for function, text in repairs:
        graph = PairEditor(model, folder)
        count = function(graph)
        if count:
            graph.finish()
            done[text] = count
    return done


def _left(model: onnx.ModelProto, folder: Path) -> tuple[list[str], list[str]]:
    """What the user must know of what is left."""
    graph = PairEditor(model, folder)
    masks, lopsided = products.mask_ranges(graph), types.lopsided_weights(graph)
    inner = sum(bool(located.where) and located.node.op_type in (QUANTIZE, DEQUANTIZE) for located in walk(model))
    first, second = [], []
    if masks:
        first.append(
            f"{masks} quantizers have a range that holds the constant of an attention mask and round everything else "
            "away; quantize the floating-point model again: deploykit quantize static"
        )
    if lopsided:
        second.append(f"{lopsided} uint8 weights stay: their zero point is not 128, so that int8 is not symmetric")
    if inner:
        second.append(f"{inner} Q/DQ nodes inside branches, loops or functions stay as they are")
    return first, second


def _write(light: LightModel, target: Path) -> None:
    """Write a copy: `write_light` releases the weights that it writes."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(light.proto)
    write_light(LightModel(copy, light.folder), target)
