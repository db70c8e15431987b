"""What two models have different: `deploykit inspect -m A --diff B`. Everything is B minus A."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.artifact import Artifact
from deploykit.errors import ModelError, first_line
from deploykit.graphs import stored_tensors, type_name
from deploykit.inspecting import inspect_model
from deploykit.modelfile import read_model
from deploykit.specs import Array

if TYPE_CHECKING:
    import onnx

SCHEMA = 1


def diff_models(path: str | Path, other: str | Path, *, dims: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Compare two artifacts or model files.

    Args:
        path: A, the reference.
        other: B.
        dims: Sizes of dynamic dimensions, for MACs and memory; names that only one of them has are used there.

    Returns:
        JSON-ready: `a` and `b` (as `inspect_model`), and what changed. Weights are compared by name, one at a time.

    Raises:
        ModelError: One of them cannot be read.
        ArtifactError: One of them was changed.
    """
    given = dict(dims or {})
    a, b = (_inspect(p, given) for p in (path, other))
    return {
        "schema": SCHEMA,
        "a": a,
        "b": b,
        "same": [key for key in ("inputs", "outputs", "opsets", "ir_version") if a[key] == b[key]],
        "signature": _signature(a, b),
        "opsets": _changed(a["opsets"], b["opsets"]),
        "ops": _counts(a["nodes"]["by_op"], b["nodes"]["by_op"]),
        "parameters": _numbers(a["parameters"], b["parameters"], ("count", "bytes")),
        "parameters_by_dtype": _counts(
            {k: v["count"] for k, v in a["parameters"]["by_dtype"].items()},
            {k: v["count"] for k, v in b["parameters"]["by_dtype"].items()},
        ),
        "macs": _numbers(a["compute"], b["compute"], ("macs",))["macs"],
        "memory": _numbers(a["memory"], b["memory"], ("weight_bytes", "peak_activation_bytes", "total_bytes")),
        "files": _numbers(a["files"], b["files"], ("bytes",)),
        "initializers": _initializers(_file(path), _file(other)),
    }


def _inspect(path: str | Path, dims: Mapping[str, int]) -> dict[str, Any]:
    plain = inspect_model(path, load=False)
    known = {axis["name"] for axis in plain["dynamic_axes"]}
    wanted = {name: size for name, size in dims.items() if name in known}
    return inspect_model(path, dims=wanted, load=False) if wanted else plain


def _file(path: str | Path) -> Path:
    given = Path(path)
    return Artifact.open(given).model_path if given.is_dir() else given


def _signature(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Inputs and outputs that only one has, or that have another dtype or shape; the order counts."""
    found = []
    for role in ("inputs", "outputs"):
        before, after = ({v["name"]: v for v in side[role]} for side in (a, b))
        for name in dict.fromkeys([*before, *after]):
            if before.get(name) != after.get(name):
                found.append({"role": role[:-1], "name": name, "a": before.get(name), "b": after.get(name)})
        if list(before) != list(after) and set(before) == set(after):
            found.append({"role": role[:-1], "name": "(order)", "a": list(before), "b": list(after)})
    return found


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {k: {"a": a.get(k), "b": b.get(k)} for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)}


def _counts(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Counts that differ, the largest difference first."""
    both = {k: (a.get(k, 0), b.get(k, 0)) for k in dict.fromkeys([*a, *b])}
    found = {k: {"a": x, "b": y, "delta": y - x} for k, (x, y) in both.items()}
    order = sorted(found, key=lambda k: (-abs(found[k]["delta"]), k))
    return {k: found[k] for k in order if found[k]["delta"]}


def _numbers(a: Mapping[str, Any], b: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {k: {"a": a[k], "b": b[k], "delta": None if a[k] is None or b[k] is None else b[k] - a[k]} for k in keys}


def _initializers(a: Path, b: Path) -> dict[str, Any] | None:
    """Stored tensors by name: those that only one has, and those with other values; None for OpenVINO IR.

    A weight that B holds as integers under the names that ONNX Runtime's quantizer gives (`w_quantized`, `w_scale`,
    `w_zero_point`) is compared by the values that the integers stand for.
    """
    if ".xml" in (a.suffix, b.suffix):
        return None
    first, second = (_by_name(read_model(p, weights=False)) for p in (a, b))
    changed, equal = [], 0
    quantized = {name for name in first if name not in second and {f"{name}_quantized", f"{name}_scale"} <= set(second)}
    for name in first:
        if name not in second and name not in quantized:
            continue
        record: dict[str, Any] | None
        if name in quantized:
            record = _compare_quantized(name, first[name], a.parent, second, b.parent)
        else:
            record = _compare(first[name], a.parent, second[name], b.parent)
        if record is None:
            equal += 1
        else:
            changed.append({"name": name, **record})
    changed.sort(key=lambda r: (r["sqnr_db"] is not None, r["sqnr_db"] or 0.0))
    return {
        "equal": equal,
        "changed": changed,
        "only_a": [_entry(name, first[name]) for name in first if name not in second and name not in quantized],
        "only_b": [_entry(name, second[name]) for name in second if name not in first],
    }


def _by_name(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {name: tensor for name, tensor in stored_tensors(model) if name}


def _entry(name: str, tensor: onnx.TensorProto) -> dict[str, Any]:
    return {"name": name, "dtype": type_name(tensor.data_type), "shape": list(tensor.dims)}


def _values(tensor: onnx.TensorProto, folder: Path) -> Array:
    from onnx import numpy_helper

    try:
        return np.asarray(numpy_helper.to_array(tensor, str(folder)))
    except (ValueError, TypeError, OSError) as exc:
        raise ModelError(f"cannot read the values of {tensor.name!r} ({first_line(exc)})") from exc


def _compare(a: onnx.TensorProto, a_folder: Path, b: onnx.TensorProto, b_folder: Path) -> dict[str, Any] | None:
    """How two tensors differ; None where they do not."""
    kinds = [_entry("", tensor) for tensor in (a, b)]
    texts = [f"{kind['dtype']}{kind['shape']}" for kind in kinds]
    before, after = _values(a, a_folder), _values(b, b_folder)
    if kinds[0] == kinds[1] and before.tobytes() == after.tobytes():
        return None
    return {"a": texts[0], "b": texts[1], **_error(before, after)}


def _compare_quantized(
    name: str, a: onnx.TensorProto, a_folder: Path, second: Mapping[str, onnx.TensorProto], b_folder: Path
) -> dict[str, Any]:
    """How a weight differs from what its integers stand for."""
    integers = second[f"{name}_quantized"]
    scale = _values(second[f"{name}_scale"], b_folder).astype(np.float64)
    zero = second.get(f"{name}_zero_point")
    points = np.zeros(1) if zero is None else _values(zero, b_folder).astype(np.float64)
    before, whole = _values(a, a_folder), _values(integers, b_folder).astype(np.float64)
    # The axis of the scales stands in the nodes; where several have its length, any other gives far worse values.
    axes = [i for i, size in enumerate(whole.shape) if size == scale.size] if scale.size > 1 else [0]
    found = []
    for axis in axes:
        shape = [scale.size if i == axis else 1 for i in range(whole.ndim)]
        zeros = points.reshape(shape) if points.size == scale.size else points
        found.append(_error(before, (whole - zeros) * scale.reshape(shape)))
    best = max(found, key=lambda e: -math.inf if e["sqnr_db"] is None else e["sqnr_db"], default=_error(before, None))
    kind, stored = _entry("", a), _entry("", integers)
    return {"a": f"{kind['dtype']}{kind['shape']}", "b": f"{stored['dtype']}{stored['shape']}, dequantized", **best}


def _error(before: Array, after: Array | None) -> dict[str, float | None]:
    """Largest difference, and signal to noise ratio in dB with A as the signal; None where there is no such number."""
    found: dict[str, float | None] = {"max_abs": None, "sqnr_db": None}
    if after is None or before.shape != after.shape or {before.dtype.kind, after.dtype.kind} & set("OSU"):
        return found
    wide = np.complex128 if "c" in (before.dtype.kind, after.dtype.kind) else np.float64
    x, y = before.astype(wide), after.astype(wide)
    with np.errstate(invalid="ignore", over="ignore"):
        noise = np.abs(x - y)
        worst = float(noise.max()) if noise.size else 0.0
        power, error = float(np.square(np.abs(x)).sum()), float(np.square(noise).sum())
    if math.isfinite(worst):
        found["max_abs"] = worst
    if error > 0 and power > 0 and math.isfinite(error) and math.isfinite(power):
        found["sqnr_db"] = round(10 * math.log10(power / error), 2)
    return found
