"""SmoothQuant: make activations easier to quantize by moving the sizes of their channels into the weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (ICML 2023,
arXiv:2211.10438): an activation with outliers in a few channels is divided by `s_j = max|X_j|^a / max|W_j|^(1-a)`,
and the rows of the weights that it is multiplied with are multiplied by the same. What is right for `a` depends on the
model and the layer (0.15 to 0.95), so it is searched for each activation, against the error that the 8-bit scheme in
use makes on real rows; that it stays as it is, is one of the candidates.

The division goes into weights that make the activation where it can (`folding`). Where it cannot (the residual stream
of a transformer reads the same tensor), a Mul is put before the products if it lowers their error by half at least.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploykit.optimizers.base import Opener
from deploykit.optimizers.editing import Editor, standard
from deploykit.optimizers.folding import apply_edits, find_place
from deploykit.optimizers.products import Product, find_products
from deploykit.optimizers.sampling import Feeder, Sample, sample_rows
from deploykit.optimizers.scheme import Scheme, error_power, rounded_activation
from deploykit.progress import Progress
from deploykit.specs import Array
from deploykit.weights import LightModel

_ALPHAS = tuple(round(0.05 * i, 2) for i in range(1, 20))
_ROWS = 512
# A Mul costs time in every inference: it has to halve the noise (3 dB).
_PAYS = 0.5
# What is folded costs nothing, but must be better than chance.
_BETTER = 0.98


@dataclass(frozen=True, slots=True)
class _Group:
    """The products that read one activation, and what was found for them."""

    tensor: str
    products: tuple[Product, ...]


def smooth(
    light: LightModel,
    nodes: list[str],
    scheme: Scheme,
    alpha: float | None,
    feeder: Feeder,
    open_model: Opener,
    folder: Path,
    progress: Progress,
) -> list[str]:
    """Smooth the inputs of matrix products, in place; the model computes the same as before.

    Args:
        light: Its weights may be written.
        nodes: Names of the nodes that will be quantized.
        scheme: How weights will be rounded.
        alpha: The one to use where it is better than none; None to search.
        feeder: Gives calibration batches.
        open_model: Opens a model file for inference.
        folder: For copies of the model.
        progress: Told how far it is.

    Returns:
        What was done, for the user.
    """
    editor = Editor(light)
    found, left = find_products(editor, nodes)
    groups: dict[str, list[Product]] = defaultdict(list)
    for product in found:
        if product.window is None:
            groups[product.data].append(product)
    if not groups:
        return ["SmoothQuant: nothing to do, no matrix product with constant weights will be quantized"]
    alphas = _ALPHAS if alpha is None else (alpha,)
    chosen: dict[str, tuple[float, float, Array]] = {}
    unseen = []
    first = [members[0] for members in groups.values()]
    done = 0
    for samples in sample_rows(light, first, feeder, open_model, folder, limit=_ROWS):
        for name, sample in samples.items():
            product = next(p for p in first if p.name == name)
            chosen[product.data] = _search(editor, groups[product.data], sample, scheme, alphas)
            done += 1
            progress.advance(done, len(first), "activations")
    unseen = [p.data for p in first if p.data not in chosen]
    folded: list[float] = []
    inserted: list[float] = []
    kept = shared = 0
    for tensor, (best, gain, factors) in chosen.items():
        members = groups[tensor]
        if gain > _BETTER:
            kept += 1
        elif _fold(editor, tensor, members, factors, scheme):
            folded.append(best)
        elif gain <= _PAYS:
            if _insert(editor, tensor, members, factors):
                inserted.append(best)
            else:
                shared += 1
        else:
            kept += 1
    return _notes(folded, inserted, kept, shared, unseen, left)


def smooth_norms(light: LightModel, nodes: list[str], scheme: Scheme) -> list[str]:
    """Smooth what layer normalizations give to matrix products, in place, without data.

    A normalization's output is its scale times values of unit variance, plus its bias; rows drawn so stand in for real
    ones. Outliers of single channels, which are what smoothing is about, come from scale and bias.

    Args:
        light: Its weights may be written.
        nodes: Names of the nodes that will be quantized.
        scheme: How weights will be rounded.

    Returns:
        What was done, for the user.
    """
    editor = Editor(light)
    found, _ = find_products(editor, nodes)
    groups: dict[str, list[Product]] = defaultdict(list)
    for product in found:
        if product.window is None and standard(editor.makers.get(product.data), "LayerNormalization"):
            groups[product.data].append(product)
    folded: list[float] = []
    inserted: list[float] = []
    kept = shared = 0
    for tensor, members in groups.items():
        rows = _normal_rows(editor, tensor, members[0].inputs)
        if rows is None:
            continue
        sample = Sample(rows[None], rows.min(axis=0), rows.max(axis=0))
        best, gain, factors = _search(editor, members, sample, scheme, _ALPHAS)
        if gain > _BETTER:
            kept += 1
        elif _fold(editor, tensor, members, factors, scheme):
            folded.append(best)
        elif gain > _PAYS:
            kept += 1
        elif _insert(editor, tensor, members, factors):
            inserted.append(best)
        else:
            shared += 1
    return _notes(folded, inserted, kept, shared, [], []) if groups else []


def _normal_rows(editor: Editor, tensor: str, width: int) -> Array | None:
    """Rows that a normalization could give; None where its weights are not a vector of the right length."""
    node = editor.makers[tensor]
    held = [name for name in node.input[1:3] if name]
    if not held or not all(editor.is_weight(n) and editor.dims(n) == (width,) for n in held):
        return None
    if not all(np.isfinite(editor.read(n)).all() for n in held):
        return None
    draw = np.random.default_rng(zlib.crc32(tensor.encode()))
    rows = draw.standard_normal((_ROWS, width), np.float32) * editor.read(held[0])
    return np.asarray(rows + editor.read(held[1]) if len(held) > 1 else rows, np.float32)


def _search(
    editor: Editor, products: list[Product], sample: Sample, scheme: Scheme, alphas: tuple[float, ...]
) -> tuple[float, float, Array]:
    """The best alpha, its error as a share of the error without, and the divisors of the channels."""
    weights = [p.matrix(editor.read(p.weight)) for p in products]
    wanted = [sample.rows @ w for w in weights]
    powers = [max(error_power(y, np.zeros_like(y)), 1e-30) for y in wanted]
    sizes = np.maximum(np.abs(sample.low), np.abs(sample.high))
    heights = np.max([np.abs(w[0]).max(axis=1) for w in weights], axis=0)

    def error(factors: Array) -> float:
        low, high = float((sample.low / factors).min()), float((sample.high / factors).max())
        rows = rounded_activation(sample.rows / factors, low, high)
        made = (rows @ scheme.rounded(w * factors[None, :, None]) for w in weights)
        return sum(error_power(y, want) / power for y, want, power in zip(made, wanted, powers, strict=True))

    plain = error(np.ones_like(sizes))
    best, lowest, kept = 0.0, plain, np.ones_like(sizes)
    for alpha in alphas:
        factors = channel_factors(sizes, heights, alpha)
        made = error(factors)
        if made < lowest:
            best, lowest, kept = alpha, made, factors
    return best, lowest / max(plain, 1e-30), kept


def channel_factors(sizes: Array, heights: Array, alpha: float) -> Array:
    """Divisors ``[channels]`` of an activation: `sizes^alpha / heights^(1 - alpha)`, 1 for channels that are nothing.

    Args:
        sizes: Largest magnitude of each channel of the activation.
        heights: Largest magnitude of the weights that each channel is multiplied with.
        alpha: 0 to 1.
    """
    live = (sizes > 0) & (heights > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = sizes.astype(np.float64) ** alpha / heights.astype(np.float64) ** (1 - alpha)
    middle = float(np.exp(np.log(factors[live]).mean())) if live.any() else 1.0
    factors = np.where(live, np.clip(factors / middle, 1e-3, 1e3), 1.0)
    return factors.astype(np.float32)


def _fold(editor: Editor, tensor: str, products: list[Product], factors: Array, scheme: Scheme) -> bool:
    """Divide where the activation is made; only if nothing but the products reads it."""
    shape = editor.shape(tensor)
    if shape is None or tensor in editor.outputs or len(editor.readers[tensor]) != len(products):
        return False
    edits = find_place(editor, tensor, len(shape), into_products=scheme.per_channel)
    if edits is None or not _own_weights(editor, products):
        return False
    if not apply_edits(editor, edits, 1 / factors):
        return False
    _multiply(editor, products, factors)
    return True


def _insert(editor: Editor, tensor: str, products: list[Product], factors: Array) -> bool:
    """Divide in a node of its own, which all products read."""
    import onnx

    if not _own_weights(editor, products):
        return False
    graph = editor.light.proto.graph
    made = editor.free_name(f"{tensor}_smooth")
    divisors = editor.add_weight(f"{tensor}_divisors", 1 / factors)
    known = next((v for v in (*graph.value_info, *graph.input) if v.name == tensor), None)
    value = onnx.helper.make_tensor_value_info(made, onnx.TensorProto.FLOAT, None)
    if known is not None:
        value.type.CopyFrom(known.type)
    graph.value_info.append(value)
    editor.insert_after(tensor, onnx.helper.make_node("Mul", [tensor, divisors], [made], name=made))
    names = {p.name for p in products}
    for node in graph.node:
        if node.name in names:
            node.input[0] = made
    _multiply(editor, products, factors)
    editor.refresh()
    return True


def _own_weights(editor: Editor, products: list[Product]) -> bool:
    """Whether the weights are those of these products only, each once."""
    return not any(editor.is_shared(p.weight) for p in products)


def _multiply(editor: Editor, products: list[Product], factors: Array) -> None:
    for product in products:
        matrix = product.matrix(editor.read(product.weight)) * product.per_input(factors)
        editor.write(product.weight, product.weight_from(matrix))


def _notes(
    folded: list[float], inserted: list[float], kept: int, shared: int, unseen: list[str], left: list[str]
) -> list[str]:
    used = sorted(folded + inserted)
    alphas = f" (alpha {used[0]:g} to {used[-1]:g})" if used else ""
    notes = [
        f"SmoothQuant: of {len(used) + kept + shared} activations {len(folded)} smoothed for nothing, "
        f"{len(inserted)} by a Mul of their own, {kept} left because it does not pay{alphas}"
    ]
    if shared:
        notes.append(f"SmoothQuant: {shared} activations left, their weights are read elsewhere too")
    if unseen:
        notes.append(f"SmoothQuant: {len(unseen)} activations left, without finite values: {', '.join(unseen[:3])}")
    if left:
        notes.append(f"SmoothQuant: {len(left)} products left: {', '.join(left[:3])}")
    return notes
