"""Models too large to be held several times: the graph in memory, large weights on disk.

Whoever rewrites such a graph sees weights as references into a file, reads them one by one where their values matter,
and writes the result piece by piece. Peak memory then follows from the largest tensor, not from their sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.errors import ModelError
from deploykit.modelfile import INLINE_LIMIT_BYTES, bits_of, inline_bytes, read_model, tensor_bytes

if TYPE_CHECKING:
    import onnx

# Up to here a model is held whole: at twice or three times this, no machine minds.
WHOLE_LIMIT_BYTES = 512 * 2**20
# In a larger model, weights of this size on stay on disk; smaller ones are there for constant folding.
LARGE_BYTES = 2**20
# ONNX Runtime maps external data into memory, which wants them to begin at a page (Windows: at 64 KiB).
_ALIGNMENT_BYTES = 65536
_PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class LightModel:
    """A graph, and the folder that its external weights are in.

    Attributes:
        proto: Large weights are external; all others are inline.
        folder: What their locations are relative to.
    """

    proto: onnx.ModelProto
    folder: Path

    @property
    def whole(self) -> bool:
        """Whether every weight is in memory."""
        return not any(is_external(t) for t in self.proto.graph.initializer)


def open_light(path: Path, scratch: Path, *, whole_limit: int | None = None) -> LightModel:
    """Read a model; whole where it is small, else with its large weights left on disk.

    Args:
        path: The `.onnx` file.
        scratch: An empty folder for weights that are inline in a large file.
        whole_limit: Bytes up to which a model is held whole; `WHOLE_LIMIT_BYTES` by default.

    Raises:
        ModelError: It cannot be read, or most of its weights are no initializers of the main graph.
    """
    proto = read_model(path, weights=False)
    limit = WHOLE_LIMIT_BYTES if whole_limit is None else whole_limit
    if inline_bytes(proto) + sum(tensor_bytes(t) for t in proto.graph.initializer if is_external(t)) <= limit:
        return LightModel(read_model(path), path.parent)
    _load_small(proto, path.parent)
    if any(is_external(t) for t in proto.graph.initializer):
        # Weights in two places at once would need two folders: large inline ones beside external ones stay inline.
        light = LightModel(proto, path.parent)
    else:
        light = LightModel(proto, scratch)
        _spill(proto, scratch / "weights.data")
    if inline_bytes(proto) >= INLINE_LIMIT_BYTES:
        raise ModelError(
            f"{path}: {inline_bytes(proto) / 1e9:.1f} GB of weights are in Constant nodes or subgraphs",
            expected="large weights as initializers of the main graph",
            hint="export it again from its source",
        )
    return light


def write_light(light: LightModel, target: Path) -> None:
    """Write a model; what is external in it goes to `<name>.data` beside it, as does everything large from 2 GB on.

    Args:
        light: Left as it is, but for weights that are released once they are written.
        target: The `.onnx` file; nothing is there.
    """
    import onnx

    proto, data = light.proto, target.with_name(f"{target.name}.data")
    outside = [t for t in proto.graph.initializer if is_external(t)]
    if inline_bytes(proto) >= INLINE_LIMIT_BYTES:
        outside = [t for t in proto.graph.initializer if is_external(t) or _may_leave(t)]
    if outside:
        with data.open("wb") as stream:
            for tensor in outside:
                stream.seek(-stream.tell() % _ALIGNMENT_BYTES, 1)
                offset = stream.tell()
                for piece in _pieces(tensor, light.folder):
                    stream.write(piece)
                _point_to(tensor, data.name, offset, stream.tell() - offset)
    onnx.save(proto, str(target))


def move_out(tensor: onnx.TensorProto, data: Path) -> None:
    """Append a tensor's values to a file and make it a reference to them, in place.

    Args:
        tensor: Inline; its folder is that of the file.
        data: Is made where it is missing.
    """
    with data.open("ab") as stream:
        stream.write(b"\0" * (-stream.tell() % _ALIGNMENT_BYTES))
        offset = stream.tell()
        for piece in _pieces(tensor, data.parent):
            stream.write(piece)
        _point_to(tensor, data.name, offset, stream.tell() - offset)


def write_copy(light: LightModel, target: Path) -> None:
    """Write a model that is still needed: `write_light` without its effects on what it is given."""
    import onnx

    proto = onnx.ModelProto()
    proto.CopyFrom(light.proto)
    write_light(LightModel(proto, light.folder), target)


def set_aside(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Turn external weights into inputs of the graph, in place, so that tools that want all values can work on it.

    Returns:
        What `put_back` needs.
    """
    import onnx

    listed = {value.name for value in proto.graph.input}  # before IR version 4, weights are listed as inputs
    kept, aside = [], []
    for tensor in proto.graph.initializer:
        if not is_external(tensor):
            kept.append(tensor)
            continue
        aside.append(tensor)
        if tensor.name not in listed:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            proto.graph.input.append(value)
    held = [_copy(t) for t in aside]
    remaining = [_copy(t) for t in kept]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(remaining)
    return held


def put_back(proto: onnx.ModelProto, aside: list[onnx.TensorProto]) -> None:
    """Undo `set_aside`, in place; weights that the graph does not know any more are left out."""
    names = {tensor.name for tensor in aside}
    present = {value.name for value in proto.graph.input} & names
    inputs = [value for value in proto.graph.input if value.name not in names]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    proto.graph.initializer.extend(t for t in aside if t.name in present)
    # From IR version 4 on, weights need not be inputs.
    proto.ir_version = max(proto.ir_version, 4)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's values are in a file."""
    import onnx

    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _may_leave(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor is large, and of a type that numpy writes as ONNX does (packed types are not)."""
    plain = is_external(tensor) or tensor.HasField("raw_data") or bits_of(tensor.data_type) >= 8
    return plain and tensor_bytes(tensor) >= LARGE_BYTES


def _copy(tensor: onnx.TensorProto) -> onnx.TensorProto:
    import onnx

    made = onnx.TensorProto()
    made.CopyFrom(tensor)
    return made


def _load_small(proto: onnx.ModelProto, folder: Path) -> None:
    """Take everything but large initializers into memory, in place."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor

    for tensor in proto.graph.initializer:
        if is_external(tensor) and not _may_leave(tensor):
            load_external_data_for_tensor(tensor, str(folder))
    large = [_copy(t) for t in proto.graph.initializer]
    del proto.graph.initializer[:]
    onnx.load_external_data_for_model(proto, str(folder))  # attributes and subgraphs
    proto.graph.initializer.extend(large)


def _spill(proto: onnx.ModelProto, data: Path) -> None:
    """Move large inline weights to a file, in place."""
    with data.open("wb") as stream:
        for tensor in proto.graph.initializer:
            if not _may_leave(tensor):
                continue
            stream.seek(-stream.tell() % _ALIGNMENT_BYTES, 1)
            offset = stream.tell()
            for piece in _pieces(tensor, data.parent):
                stream.write(piece)
            _point_to(tensor, data.name, offset, stream.tell() - offset)


def _pieces(tensor: onnx.TensorProto, folder: Path) -> Iterator[bytes]:
    """A tensor's values as they stand in a file, little endian."""
    from onnx import numpy_helper

    if not is_external(tensor):
        yield tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    left = tensor_bytes(tensor)
    with (folder / entries["location"]).open("rb") as stream:
        stream.seek(int(entries.get("offset") or 0))
        while left:
            piece = stream.read(min(left, _PIECE_BYTES))
            if not piece:
                raise ModelError(f"{folder / entries['location']} is cut off", hint="export the model again")
            left -= len(piece)
            yield piece


def _point_to(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Make a tensor a reference into a file, in place; the values that it held are released."""
    import onnx

    for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(field)
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
