"""What a model is and costs, without running it: `deploykit inspect`.

The result is JSON-ready and its keys are stable: `schema` is raised when one changes its meaning or goes away. Weights
stay in their files; what is counted follows from shapes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.artifact import Artifact
from deploykit.contract import Violation, contract_of, violations
from deploykit.costs import count_compute, count_quantized, peak_memory
from deploykit.errors import DataError, ModelError
from deploykit.graphs import element_bits, opsets_of, stored_tensors, type_name, walk
from deploykit.loading import LoadResult, not_tried, try_loading
from deploykit.modelfile import check_model, external_files, read_model
from deploykit.shaping import Trace, size_of, trace_model
from deploykit.specs import terms
from deploykit.targets import Target

if TYPE_CHECKING:
    import onnx

SCHEMA = 1
# Above this, loading is tried only when asked for: it takes as much memory again.
_LOAD_LIMIT_BYTES = 2**30
# What is inline and larger than this is dropped once the file is parsed: shapes are all that counts.
_KEPT_BYTES = 4096
_STANDARD = ("", "ai.onnx.ml")
# Sizes of dynamic dimensions where --dim gives none: samples, sides of images, all others. The second set is for graphs
# that cannot take the first.
_DEFAULT_SIZES = ((1, 224, 128), (1, 64, 16))
_IMAGE_RANK = 4
_LENGTHS = re.compile("seq|len|past|total|cache|time|token", re.IGNORECASE)


def inspect_model(
    path: str | Path,
    *,
    dims: Mapping[str, int] | None = None,
    contract: Sequence[str] = (),
    load: bool | None = None,
) -> dict[str, Any]:
    """Describe an artifact, an `.onnx` file or an OpenVINO `.xml`.

    Args:
        path: The model.
        dims: Sizes of dynamic dimensions, for MACs and memory.
        contract: Runtimes whose limits it is held to, as in `export`, beside those that an artifact was made for.
        load: Whether to try the runtimes; None for models below 1 GiB.

    Returns:
        A JSON-ready dictionary. MACs and bytes of activations are for one run at `compute.sizes`.

    Raises:
        ModelError: Missing, no model, or with unsafe external data.
        ArtifactError: Changed since it was written.
        DataError: `dims` names a dimension that the model does not have.
        ContractError: An unknown target.
    """
    given = Path(path)
    artifact = Artifact.open(given) if given.is_dir() else None
    file = artifact.model_path if artifact else given
    if not file.exists():
        raise ModelError(f"{file} does not exist", expected="an artifact directory, an .onnx or an .xml file")
    targets = contract_of(artifact.manifest.lineage if artifact else (), contract)
    found: dict[str, Any] = {"schema": SCHEMA, "model": str(given)}
    if file.suffix == ".xml":
        from deploykit.inspecting_ir import describe_ir, ir_violations

        # In a process of its own first: what crashes OpenVINO must not crash us.
        runtimes = _loads(file, file.stat().st_size, load)
        crashed = next((r.reason for r in runtimes if r.reason and r.reason.startswith("it crashed")), None)
        if crashed:
            raise ModelError(f"OpenVINO cannot read {file}: {crashed}", hint="make it again")
        found |= describe_ir(file, dims or {})
        broken = ir_violations(file, targets)
    else:
        model = read_model(file, weights=False)
        broken = violations(model, targets)
        found |= _describe(model, file, dims or {})
        runtimes = _loads(file, found["files"]["bytes"], load)
    found["contract"] = _contract(targets, broken)
    found["runtimes"] = [r.as_dict() for r in runtimes]
    found["artifact"] = None if artifact is None else _artifact(artifact)
    return found


def _describe(model: onnx.ModelProto, file: Path, dims: Mapping[str, int]) -> dict[str, Any]:
    parameters = count_parameters(model)
    try:
        check_model(model, file)
        invalid = None
    except ModelError as exc:
        invalid = exc.what
    _drop_weights(model)
    inputs = real_inputs(model)
    symbols = symbols_of(inputs)
    _check_dims(symbols, dims)
    sizes, trace = _trace(model, file, inputs, symbols, dims)
    compute = count_compute(trace)
    peak = peak_memory(trace, {v.name: trace.values[v.name] for v in inputs if v.name in trace.values})
    weights = parameters["bytes"]
    return {
        "format": "onnx",
        "invalid": invalid,
        "files": describe_files([file, *(file.parent / f for f in sorted(external_files(model)))]),
        "ir_version": int(model.ir_version),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": opsets_of(model),
        "inputs": [_value(v) for v in inputs],
        "outputs": [_value(v) for v in model.graph.output],
        "dynamic_axes": _dynamic_axes([*inputs, *model.graph.output], sizes),
        "nodes": _nodes(model),
        "custom_ops": _custom_ops(model),
        "parameters": parameters,
        "compute": {"sizes": sizes, **compute.as_dict()},
        "memory": {
            "weight_bytes": weights,
            "peak_activation_bytes": peak.bytes,
            "total_bytes": weights + peak.bytes,
            "at_node": peak.node,
            "unknown_tensors": peak.unknown,
        },
        "quantized": count_quantized(trace).as_dict(),
        "unshaped": [{"node": label, "reason": why} for label, why in trace.failures.items()],
    }


def _contract(targets: Sequence[Target], broken: Sequence[Violation]) -> dict[str, Any]:
    return {
        "targets": [t.name for t in targets],
        "violations": [v.as_dict() for v in broken],
        "notes": [f"{t.name}: {note}" for t in targets for note in t.notes],
        "sources": list(dict.fromkeys(s for t in targets for s in t.sources)),
    }


def _loads(file: Path, size: int, load: bool | None) -> list[LoadResult]:
    if load is False:
        return not_tried(file, "not tried: --no-load")
    if load is None and size > _LOAD_LIMIT_BYTES:
        return not_tried(file, f"not tried, because the model has {size / 1e9:.1f} GB; add --load")
    return try_loading(file)


def _artifact(artifact: Artifact) -> dict[str, Any]:
    manifest = json.loads(artifact.manifest.model_dump_json())
    return {
        "sha256": artifact.digest,
        "created": manifest["created"],
        "model_bytes": artifact.size_bytes,
        "golden_cases": len(artifact.golden()),
        "lineage": manifest["lineage"],
        "evidence": manifest["evidence"],
    }


def describe_files(paths: Sequence[Path]) -> dict[str, Any]:
    """Sizes of a model's files, the model itself first; the others are external data."""
    sizes = {p.name if i == 0 else str(p): p.stat().st_size for i, p in enumerate(paths)}
    return {"bytes": sum(sizes.values()), "external": len(paths) - 1, "sizes": sizes}


# --- signature -------------------------------------------------------------------------------------------------------


def real_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs without the weights that old IR versions list among them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def symbols_of(inputs: Sequence[onnx.ValueInfoProto]) -> dict[str, tuple[int, int, bool]]:
    """Dynamic dimensions of the inputs: axis and rank at the first place, and whether it is one of floats."""
    found: dict[str, tuple[int, int, bool]] = {}
    for value in inputs:
        tensor = value.type.tensor_type
        floats = type_name(tensor.elem_type).startswith(("float", "bfloat"))
        for axis, dim in enumerate(tensor.shape.dim):
            name = _symbol(value.name, axis, dim)
            if name is not None:
                found.setdefault(name, (axis, len(tensor.shape.dim), floats))
    return found


def _symbol(name: str, axis: int, dim: Any) -> str | None:
    fixed = dim.HasField("dim_value") and dim.dim_value >= 0
    return None if fixed else str(dim.dim_param) or f"{name}_dim{axis}"


def _check_dims(symbols: Mapping[str, Any], dims: Mapping[str, int]) -> None:
    unknown = next((name for name in dims if name not in symbols), None)
    if unknown is not None:
        raise DataError(
            f"--dim names {unknown!r}, which is no dynamic dimension of the model",
            expected=f"one of {', '.join(symbols) or 'none: all dimensions are fixed'}",
        )


def _trace(
    model: onnx.ModelProto,
    file: Path,
    inputs: Sequence[onnx.ValueInfoProto],
    symbols: Mapping[str, tuple[int, int, bool]],
    dims: Mapping[str, int],
) -> tuple[dict[str, int], Trace]:
    """Follow the shapes at the sizes that were given, and at default ones; the smaller defaults where it fails."""
    tried: list[tuple[dict[str, int], Trace]] = []
    for samples, side, length in _DEFAULT_SIZES:
        sizes = dict(dims)
        for name, (axis, rank, floats) in symbols.items():
            # A cache of keys has four axes as well, and says what the third one is.
            image = rank == _IMAGE_RANK and floats and axis > 1 and not _LENGTHS.search(name)
            default = samples if axis == 0 else side if image else length
            # A sum of other dimensions follows from them.
            if size_of(name, sizes) is None and len(terms(name)) == 1:
                sizes[name] = default
        for name in symbols:
            sizes.setdefault(name, size_of(name, sizes) or length)
        tried.append((sizes, trace_model(model, file, sizes)))
        if not tried[-1][1].failures or tried[-1][0] == dict(dims):
            break
    return min(tried, key=lambda found: len(found[1].failures))


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Name, dtype and shape; None for a rank that is not known. Sequences and the like are named as what they are."""
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return {"name": value.name, "dtype": (kind or "unknown").removesuffix("_type"), "shape": None}
    tensor = value.type.tensor_type
    shape: list[int | str] | None = None
    if tensor.HasField("shape"):
        shape = [
            int(dim.dim_value) if (name := _symbol(value.name, axis, dim)) is None else name
            for axis, dim in enumerate(tensor.shape.dim)
        ]
    return {"name": value.name, "dtype": type_name(tensor.elem_type), "shape": shape}


def _dynamic_axes(values: Sequence[onnx.ValueInfoProto], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for value in values:
        tensor = value.type.tensor_type
        if value.type.WhichOneof("value") == "tensor_type" and not tensor.HasField("shape"):
            found.append({"tensor": value.name, "axis": None, "name": None, "size": None})
        for axis, dim in enumerate(tensor.shape.dim):
            name = _symbol(value.name, axis, dim)
            if name is not None:
                found.append({"tensor": value.name, "axis": axis, "name": name, "size": size_of(name, sizes)})
    return found


# --- contents --------------------------------------------------------------------------------------------------------


def _nodes(model: onnx.ModelProto) -> dict[str, Any]:
    places: Counter[str] = Counter()
    ops: Counter[str] = Counter()
    names = []
    own = {(f.domain, f.name) for f in model.functions}
    for located in walk(model):
        where = "main" if not located.where else "functions" if located.where.startswith("function ") else "subgraphs"
        places[where] += 1
        ops[f"{located.domain}.{located.node.op_type}" if located.domain else located.node.op_type] += 1
        if where == "main":
            names.append(located.node.name)
    return {
        "total": sum(places.values()),
        "main": places["main"],
        "subgraphs": places["subgraphs"],
        "functions": places["functions"],
        "local_functions": sorted(f"{domain}.{name}" for domain, name in own),
        "by_op": dict(ops.most_common()),
        "names": names,
    }


def _custom_ops(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """Operators outside of the standard that are not the model's own functions."""
    own = {(f.domain, f.name) for f in model.functions}
    found = Counter(
        (located.domain, located.node.op_type)
        for located in walk(model)
        if located.domain not in _STANDARD and (located.node.domain, located.node.op_type) not in own
    )
    return [{"domain": domain, "op": op, "count": count} for (domain, op), count in found.most_common()]


def count_parameters(model: onnx.ModelProto) -> dict[str, Any]:
    """Elements and bytes of everything that the file stores: initializers and Constant nodes, wherever they stand.

    Tensors that point to the same bytes of an external file count once. Elements narrower than a byte count as what
    they are; two 4-bit weights that ONNX Runtime packs into one uint8 count as one uint8.
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    seen: set[tuple[tuple[str, str], ...]] = set()
    shared = 0
    for _, tensor in stored_tensors(model):
        place = tuple(sorted((e.key, e.value) for e in tensor.external_data if e.key != "checksum"))
        if place and place in seen:
            shared += 1
            continue
        seen.add(place)
        name, elements = type_name(tensor.data_type), math.prod(tensor.dims)
        counts[name] += elements
        strings = sum(len(text) for text in tensor.string_data)
        sizes[name] += strings if strings else math.ceil(elements * element_bits(tensor.data_type) / 8)
    return {
        "count": sum(counts.values()),
        "bytes": sum(sizes.values()),
        "by_dtype": {name: {"count": counts[name], "bytes": sizes[name]} for name, _ in sizes.most_common()},
        "shared_tensors": shared,
    }


def _drop_weights(model: onnx.ModelProto) -> None:
    """Forget large inline weights: following the shapes copies the model, and they are not looked at again."""
    for _, tensor in stored_tensors(model):
        if tensor.data_location != tensor.EXTERNAL and tensor.ByteSize() > _KEPT_BYTES:
            for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(name)
