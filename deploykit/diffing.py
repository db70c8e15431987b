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
    """Stored tensors by name: those that only one has, and those with other values; None for OpenVINO IR."""
    if ".xml" in (a.suffix, b.suffix):
        return None
    first, second = (_by_name(read_model(p, weights=False)) for p in (a, b))
    changed, equal = [], 0
    for name in first:
        if name not in second:
            continue
        record = _compare(first[name], a.parent, second[name], b.parent)
        if record is None:
            equal += 1
        else:
            changed.append({"name": name, **record})
    changed.sort(key=lambda r: (r["sqnr_db"] is not None, r["sqnr_db"] or 0.0))
    return {
        "equal": equal,
        "changed": changed,
        "only_a": [_entry(name, first[name]) for name in first if name not in second],
        "only_b": [_entry(name, second[name]) for name in second if name not in first],
    }


def _by_name(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {name: tensor for name, tensor in stored_tensors(model) if name}


def _entry(name: str, tensor: onnx.TensorProto) -> dict[str, Any]:
    return {"name": name, "dtype": type_name(tensor.data_type), "shape": list(tensor.dims)}


def _compare(a: onnx.TensorProto, a_folder: Path, b: onnx.TensorProto, b_folder: Path) -> dict[str, Any] | None:
    """How two tensors differ; None where they do not. SQNR is in dB, with A as the signal."""
    from onnx import numpy_helper

    kinds = [_entry("", tensor) for tensor in (a, b)]
    record: dict[str, Any] = {
        "a": f"{kinds[0]['dtype']}{kinds[0]['shape']}", "b": f"{kinds[1]['dtype']}{kinds[1]['shape']}",
        "max_abs": None, "sqnr_db": None,
    }  # fmt: skip
    try:
        before, after = numpy_helper.to_array(a, str(a_folder)), numpy_helper.to_array(b, str(b_folder))
    except (ValueError, TypeError, OSError) as exc:
        raise ModelError(f"cannot read the values of {a.name!r} ({first_line(exc)})") from exc
    if kinds[0] == kinds[1] and before.tobytes() == after.tobytes():
        return None
    if before.shape != after.shape or before.dtype.kind in "OSU" or after.dtype.kind in "OSU":
        return record
    wide = np.complex128 if "c" in (before.dtype.kind, after.dtype.kind) else np.float64
    x, y = before.astype(wide), after.astype(wide)
    with np.errstate(invalid="ignore", over="ignore"):
        noise = np.abs(x - y)
        worst = float(noise.max()) if noise.size else 0.0
        power, error = float(np.square(np.abs(x)).sum()), float(np.square(noise).sum())
    if math.isfinite(worst):
        record["max_abs"] = worst
    if error > 0 and power > 0 and math.isfinite(error) and math.isfinite(power):
        record["sqnr_db"] = round(10 * math.log10(power / error), 2)
    return record
