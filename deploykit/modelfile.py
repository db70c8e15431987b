"""ONNX files on disk: read them safely, describe them, write them whole.

Every external-data location is checked before any library or runtime is shown the file (onnx CVE-2022-25882,
CVE-2024-27318, CVE-2025-51480, CVE-2026-27489, CVE-2026-34446): it has to be a regular file, reached without links,
below the model's own folder, and long enough for the bytes that the model claims.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.errors import ModelError, first_line
from deploykit.specs import Dim, Signature, TensorSpec

if TYPE_CHECKING:
    import onnx

# protobuf refuses messages of 2 GiB; above this, weights go to a file of their own.
INLINE_LIMIT_BYTES = 1_900_000_000
# The fields of onnx.proto below which there may be tensors.
_TENSOR_FIELDS = frozenset(
    {
        "graph", "node", "initializer", "sparse_initializer", "values", "indices", "functions", "training_info",
        "initialization", "algorithm", "attribute", "attribute_proto", "t", "tensors", "sparse_tensor",
        "sparse_tensors", "g", "graphs",
    }
)  # fmt: skip
_RE_EXPORT = "export it again from its source, or fetch the file again"
# What the standard lets a tensor say of its external data; ONNX Runtime adds keys of weights that it packed.
_ENTRIES = frozenset({"location", "offset", "length", "checksum"})
_DECIMAL = re.compile(r"[0-9]{1,19}")
# ONNX Runtime takes such a location for an address in its own memory, and the offset for where.
_MEMORY = re.compile(r"_ORT_\w*MEM_ADDR_")


def read_model(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Parse an ONNX file.

    Args:
        path: The `.onnx` file.
        weights: Whether external weights are loaded too.

    Raises:
        ModelError: Missing, no ONNX, without a graph, or with unsafe external data.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.exists():
        raise ModelError(f"{path} does not exist", expected="an .onnx file or an artifact directory")
    if path.is_dir():
        raise ModelError(
            f"{path} is a directory without manifest.json", expected="an .onnx file or an artifact directory"
        )
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, UnicodeDecodeError) as exc:
        raise ModelError(f"{path} is not an ONNX file, or is cut off ({first_line(exc)})", hint=_RE_EXPORT) from exc
    except OSError as exc:
        raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc
    if not model.opset_import or not model.graph.output:
        raise ModelError(f"{path} holds no graph", expected="a model with an opset and outputs", hint=_RE_EXPORT)
    check_external_data(model, path)
    _check_types(model, path)
    if weights:
        try:
            onnx.load_external_data_for_model(model, str(path.parent))
        except (onnx.checker.ValidationError, ValueError, OSError) as exc:
            raise ModelError(f"{path}: cannot read its external data ({first_line(exc)})", hint=_RE_EXPORT) from exc
    return model


def check_model(model: onnx.ModelProto, path: Path) -> None:
    """Run ONNX's own checker, but for what runtimes do without: shapes of inputs and outputs, the graph's name.

    Raises:
        ModelError: It found something, in its words.
    """
    import onnx

    try:
        if _lacks_formalities(model):
            onnx.checker.check_model(_with_formalities(model))
        else:
            # Beyond 2 GB, and with weights outside, the checker wants the path.
            onnx.checker.check_model(str(path) if external_files(model) else model)
    except (onnx.checker.ValidationError, ValueError) as exc:
        raise ModelError(f"{path} is not valid ONNX ({first_line(exc)})", hint=_RE_EXPORT) from exc


def _lacks_formalities(model: onnx.ModelProto) -> bool:
    """Whether the checker would refuse a model for an unknown rank, or because its graph has no name."""
    values = [*model.graph.input, *model.graph.output]
    return not model.graph.name or any(
        v.type.WhichOneof("value") == "tensor_type" and not v.type.tensor_type.HasField("shape") for v in values
    )


def _with_formalities(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for the checker, which looks at no shape that is given: with them, and without external weights."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.name = copy.graph.name or "graph"
    for tensor in _tensors(copy):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:  # looked at when the file was read
            tensor.CopyFrom(
                onnx.TensorProto(name=tensor.name, data_type=onnx.TensorProto.UINT8, dims=[0], raw_data=b"")
            )
    for value in [*copy.graph.input, *copy.graph.output]:
        if value.type.WhichOneof("value") == "tensor_type" and not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.SetInParent()
    return copy


def external_files(model: onnx.ModelProto) -> set[str]:
    """Locations of all external data, as written in the model."""
    return {info["location"] for _, info in _external_tensors(model) if "location" in info}


def _external_tensors(model: onnx.ModelProto) -> Iterator[tuple[str, dict[str, str]]]:
    import onnx

    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            # Of a key given twice, libraries take different ones; what is no UTF-8 comes as bytes. Without a location
            # the tensor is refused.
            plain = all(isinstance(text, str) for pair in entries.items() for text in pair)
            yield tensor.name, entries if plain and len(entries) == len(tensor.external_data) else {}


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor anywhere in a message: weights, sparse ones, attributes, subgraphs, functions, training graphs."""
    import onnx

    for field, value in message.ListFields():
        if field.name not in _TENSOR_FIELDS or field.message_type is None:
            continue
        for item in (value,) if hasattr(value, "ListFields") else value:
            if isinstance(item, onnx.TensorProto):
                yield item
            else:
                yield from _tensors(item)


def check_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Refuse every external-data reference that is not a plain file below the model's folder.

    Raises:
        ModelError: A location is missing, absolute, leaves the folder, passes a link, is a hard link, or is too short.
    """
    check_references(_external_tensors(model), path)


def check_references(references: Iterable[tuple[str, Mapping[str, str]]], path: Path) -> None:
    """Refuse every reference of a model that is not to a plain file below the model's folder.

    Args:
        references: Name of the tensor, and the entries of its external data.
        path: The model's file.

    Raises:
        ModelError: As `check_external_data`.
    """
    for name, info in references:
        location = info.get("location", "")
        why = _unsafe(path.parent, location) or _beyond(path.parent / location, info)
        if why is not None:
            raise ModelError(
                f"{path}: external data {location!r:.300} of tensor {name!r:.300} {why}",
                expected="a regular file beside the model",
                hint="copy the weights' file beside the model (cp --dereference)",
            )


def _beyond(file: Path, info: Mapping[str, str]) -> str | None:
    """What is wrong with what a tensor says of its place in a file."""
    strange = sorted(key for key in info if key not in _ENTRIES and not key.startswith("prepacked"))
    if strange:
        return f"has an entry {strange[0]!r:.100}"
    offset, length = info.get("offset") or "0", info.get("length") or "0"
    size = file.stat().st_size
    # Python also reads "1_6", " 16" and the digits of other scripts, and a runtime something else of them.
    plain = _DECIMAL.fullmatch(offset) and _DECIMAL.fullmatch(length)
    if not plain or int(offset) + int(length) > size:
        return f"has {size} bytes, and the tensor claims {length:.40} at {offset:.40}"
    return None


def check_beside(file: Path) -> None:
    """Refuse a companion of a model (the weights of OpenVINO IR) that is a link, or no regular file.

    Raises:
        ModelError: It is.
    """
    why = _unsafe(file.parent, file.name)
    if why is not None:
        raise ModelError(f"{file} {why}", expected="a regular file", hint="copy it (cp --dereference)")


def _check_types(model: onnx.ModelProto, path: Path) -> None:
    """Refuse tensors of a type that the standard does not have: libraries fail on them in many ways."""
    import onnx

    known = set(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED}
    for tensor in _tensors(model):
        if tensor.data_type not in known:
            raise ModelError(
                f"{path}: tensor {tensor.name!r:.300} is of type {tensor.data_type}",
                expected="a type of the ONNX standard",
                hint=_RE_EXPORT,
            )


def _unsafe(folder: Path, location: str) -> str | None:
    if "\\" in location:
        return "has a backslash, which Windows takes for a folder and Linux does not"
    parts = Path(location).parts
    if not parts or "\0" in location:
        return "has no location"
    if Path(location).is_absolute() or ".." in parts:
        return "leaves the model's folder"
    if _MEMORY.search(location):
        return "is a mark that ONNX Runtime takes for an address in memory; it does not exist as a file"
    here = folder
    for index, part in enumerate(parts):
        here = here / part
        try:
            info = os.lstat(here)
        except OSError:
            return "does not exist"
        if stat.S_ISLNK(info.st_mode):
            return "is, or passes, a symbolic link"
        if index == len(parts) - 1:
            if not stat.S_ISREG(info.st_mode):
                return "is not a regular file"
            if info.st_nlink > 1:
                return "is a hard link"
    return None


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Write an ONNX file; weights go to `<name>.data` beside it where the file would pass protobuf's 2 GiB."""
    import onnx

    if inline_bytes(model) < INLINE_LIMIT_BYTES:
        onnx.save(model, str(path))
    else:
        onnx.save(model, str(path), save_as_external_data=True, location=path.name + ".data", size_threshold=1024)


def inline_bytes(model: onnx.ModelProto) -> int:
    """About the size of a model's file: its tensors that are in memory.

    protobuf's own ByteSize serializes the message to measure it, and fails from 2 GiB on.
    """
    import onnx

    return sum(tensor_bytes(t) for t in _tensors(model) if t.data_location != onnx.TensorProto.EXTERNAL)


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Size of a tensor's values in a file."""
    import onnx

    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        length = next((entry.value for entry in tensor.external_data if entry.key == "length"), "")
        if length:
            return int(length)
    bits: int = math.prod(tensor.dims) * bits_of(tensor.data_type)
    return -(-bits // 8)


def bits_of(data_type: int) -> int:
    """Bits of one element in a file; 0 for strings."""
    import onnx

    name = onnx.TensorProto.DataType.Name(data_type)
    packed = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
    if name in packed:
        return packed[name]
    return 0 if name in ("STRING", "UNDEFINED") else 8 * int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def copy_model(source: Path, target: Path) -> None:
    """Copy an ONNX file with its external data, each as a real file, to ``target`` and its folder."""
    model = read_model(source, weights=False)
    for location in sorted(external_files(model)):
        if Path(location) == Path(target.name):
            raise ModelError(
                f"{source}: its external data are named {location!r}",
                expected="another name than the model's",
            )
        copy = target.parent / location
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.parent / location, copy)
    shutil.copyfile(source, target)


def model_bytes(path: Path) -> int:
    """Size of a model on disk, weights included: `.onnx` with external data, or `.xml` with its `.bin`."""
    total = path.stat().st_size
    if path.suffix == ".xml":
        weights = path.with_suffix(".bin")
        return total + (weights.stat().st_size if weights.exists() else 0)
    files = external_files(read_model(path, weights=False))
    return total + sum((path.parent / f).stat().st_size for f in files)


def signature_of(model: onnx.ModelProto) -> Signature:
    """Inputs (initializers left out) and outputs of a model.

    Raises:
        ModelError: One of them is not a tensor.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    return Signature(tuple(_spec(v) for v in inputs), tuple(_spec(v) for v in model.graph.output))


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        maps = kind in ("sequence_type", "map_type")
        raise ModelError(
            f"{value.name!r} is of kind {(kind or 'unknown').removesuffix('_type')}",
            expected="tensors as inputs and outputs",
            hint="for scikit-learn models convert with zipmap=False" if maps else "wrap the model",
        )
    tensor = value.type.tensor_type
    shape: tuple[Dim, ...] | None = None
    if tensor.HasField("shape"):
        shape = tuple(_dim(value.name, axis, dim) for axis, dim in enumerate(tensor.shape.dim))
    return TensorSpec(value.name, dtype_name(tensor.elem_type), shape)


def _dim(name: str, axis: int, dim: Any) -> Dim:
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return int(dim.dim_value)
    return str(dim.dim_param) or f"{name}_dim{axis}"


def dtype_name(elem_type: int) -> str:
    """The numpy name of an ONNX element type ("float32"); "string" for strings.

    Raises:
        ModelError: The type has no name here.
    """
    import onnx

    if elem_type == onnx.TensorProto.STRING:
        return "string"
    try:
        return str(onnx.helper.tensor_dtype_to_np_dtype(elem_type).name)
    except (KeyError, ValueError) as exc:
        raise ModelError(f"unknown tensor element type {elem_type}", expected="a type of the ONNX standard") from exc


def rename_dimensions(model: onnx.ModelProto, shapes: Mapping[str, tuple[Dim, ...]]) -> None:
    """Write the shapes of inputs and outputs, in place, and give up on stale names inside the graph.

    A symbol of the old inputs becomes the new one everywhere; intermediate shapes that still use unknown symbols are
    dropped, because runtimes infer them again.
    """
    renamed: dict[str, str] = {}
    for value in [*model.graph.input, *model.graph.output]:
        if value.name not in shapes:
            continue
        old = value.type.tensor_type.shape.dim
        for dim, new in zip(old, shapes[value.name], strict=True):
            if dim.dim_param and isinstance(new, str):
                renamed.setdefault(dim.dim_param, new)
        _set_shape(value, shapes[value.name])
    known = set(renamed.values())
    kept = []
    for value in model.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        for dim in dims:
            if dim.dim_param in renamed:
                dim.dim_param = renamed[dim.dim_param]
        if all(not d.dim_param or d.dim_param in known for d in dims):
            kept.append(value)
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


def _set_shape(value: onnx.ValueInfoProto, shape: tuple[Dim, ...]) -> None:
    dims = value.type.tensor_type.shape
    del dims.dim[:]
    for size in shape:
        dim = dims.dim.add()
        if isinstance(size, str):
            dim.dim_param = size
        else:
            dim.dim_value = size
