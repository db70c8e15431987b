"""Messages of `inference.GRPCInferenceService`, made from descriptors of our own.

The descriptors live in a pool of their own, so that a client's generated module of the same names can be imported in
the same process. Field numbers are those of the Open Inference Protocol; the repository's are Triton's, and the
parameters of a model's metadata are MLServer's.

Tensors are by far the most of a message. `split_raw` and `join_raw` read and write them beside the rest, so that a
request's are not copied at all and an answer's once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from deploykit.extras import require
from deploykit.serving.requests import InvalidRequest

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"

RAW_INPUTS = 7
RAW_OUTPUTS = 6
# Fields at the top of a request, each of which costs a turn of a loop.
_MOST_FIELDS = 16384

_PARAMETERS = "<InferParameter>"
# Message -> field -> number and type; "*" repeats, "<M>" is a map from strings to M, "|" is one of several.
_INFERENCE: dict[str, dict[str, tuple[int, str]]] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ModelReadyRequest": {"name": (1, "string"), "version": (2, "string")},
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {"name": (1, "string"), "version": (2, "string"), "extensions": (3, "*string")},
    "ModelMetadataRequest": {"name": (1, "string"), "version": (2, "string")},
    "ModelMetadataResponse.TensorMetadata": {
        "name": (1, "string"),
        "datatype": (2, "string"),
        "shape": (3, "*int64"),
    },
    "ModelMetadataResponse": {
        "name": (1, "string"),
        "versions": (2, "*string"),
        "platform": (3, "string"),
        "inputs": (4, "*ModelMetadataResponse.TensorMetadata"),
        "outputs": (5, "*ModelMetadataResponse.TensorMetadata"),
        "parameters": (6, _PARAMETERS),
    },
    "InferParameter": {
        "bool_param": (1, "|bool"),
        "int64_param": (2, "|int64"),
        "string_param": (3, "|string"),
        "double_param": (4, "|double"),
        "uint64_param": (5, "|uint64"),
    },
    "InferTensorContents": {
        "bool_contents": (1, "*bool"),
        "int_contents": (2, "*int32"),
        "int64_contents": (3, "*int64"),
        "uint_contents": (4, "*uint32"),
        "uint64_contents": (5, "*uint64"),
        "fp32_contents": (6, "*float"),
        "fp64_contents": (7, "*double"),
        "bytes_contents": (8, "*bytes"),
    },
    "ModelInferRequest.InferInputTensor": {
        "name": (1, "string"),
        "datatype": (2, "string"),
        "shape": (3, "*int64"),
        "parameters": (4, _PARAMETERS),
        "contents": (5, "InferTensorContents"),
    },
    "ModelInferRequest.InferRequestedOutputTensor": {"name": (1, "string"), "parameters": (2, _PARAMETERS)},
    "ModelInferRequest": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, _PARAMETERS),
        "inputs": (5, "*ModelInferRequest.InferInputTensor"),
        "outputs": (6, "*ModelInferRequest.InferRequestedOutputTensor"),
        "raw_input_contents": (RAW_INPUTS, "*bytes"),
    },
    "ModelInferResponse.InferOutputTensor": {
        "name": (1, "string"),
        "datatype": (2, "string"),
        "shape": (3, "*int64"),
        "parameters": (4, _PARAMETERS),
        "contents": (5, "InferTensorContents"),
    },
    "ModelInferResponse": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, _PARAMETERS),
        "outputs": (5, "*ModelInferResponse.InferOutputTensor"),
        "raw_output_contents": (RAW_OUTPUTS, "*bytes"),
    },
    "ModelRepositoryParameter": {
        "bool_param": (1, "|bool"),
        "int64_param": (2, "|int64"),
        "string_param": (3, "|string"),
        "bytes_param": (4, "|bytes"),
    },
    "RepositoryIndexRequest": {"repository_name": (1, "string"), "ready": (2, "bool")},
    "RepositoryIndexResponse.ModelIndex": {
        "name": (1, "string"),
        "version": (2, "string"),
        "state": (3, "string"),
        "reason": (4, "string"),
    },
    "RepositoryIndexResponse": {"models": (1, "*RepositoryIndexResponse.ModelIndex")},
    "RepositoryModelLoadRequest": {
        "repository_name": (1, "string"),
        "model_name": (2, "string"),
        "parameters": (3, "<ModelRepositoryParameter>"),
    },
    "RepositoryModelLoadResponse": {},
    "RepositoryModelUnloadRequest": {
        "repository_name": (1, "string"),
        "model_name": (2, "string"),
        "parameters": (3, "<ModelRepositoryParameter>"),
    },
    "RepositoryModelUnloadResponse": {},
}
# The health check that Kubernetes' gRPC probes make; the status is an enumeration, which is a number on the wire.
_HEALTH: dict[str, dict[str, tuple[int, str]]] = {
    "HealthCheckRequest": {"service": (1, "string")},
    "HealthCheckResponse": {"status": (1, "int32")},
}


@cache
def messages() -> dict[str, Any]:
    """Message classes by name, without their package.

    Raises:
        MissingDependencyError: The extra "serve" is not installed.
    """
    pools = require("google.protobuf.descriptor_pool", extra="serve")
    factory = require("google.protobuf.message_factory", extra="serve")
    pool = pools.DescriptorPool()
    found = {}
    for package, table in (("inference", _INFERENCE), ("grpc.health.v1", _HEALTH)):
        pool.Add(_file(package, table))
        for name in table:
            found[name] = factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
    return found


def _file(package: str, table: dict[str, dict[str, tuple[int, str]]]) -> Any:
    pb = require("google.protobuf.descriptor_pb2", extra="serve")
    file = pb.FileDescriptorProto(name=f"deploykit/{package}.proto", package=package, syntax="proto3")
    made: dict[str, Any] = {}
    for name in sorted(table, key=lambda n: n.count(".")):
        outer, _, inner = name.rpartition(".")
        made[name] = (made[outer].nested_type if outer else file.message_type).add(name=inner)
    for name, fields in table.items():
        for field, (number, kind) in fields.items():
            _add_field(made[name], f".{package}", name, field, number, kind)
    return file


def _add_field(message: Any, package: str, owner: str, name: str, number: int, kind: str) -> None:
    pb = require("google.protobuf.descriptor_pb2", extra="serve")
    field = message.field.add(name=name, number=number, label=pb.FieldDescriptorProto.LABEL_OPTIONAL)
    if kind.startswith("<"):
        entry = message.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        _add_field(entry, package, f"{owner}.{entry.name}", "key", 1, "string")
        _add_field(entry, package, f"{owner}.{entry.name}", "value", 2, kind.strip("<>"))
        kind = f"*{owner}.{entry.name}"
    if kind.startswith("*"):
        field.label = pb.FieldDescriptorProto.LABEL_REPEATED
    if kind.startswith("|"):
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    kind = kind.strip("*|")
    if kind[0].isupper():
        field.type = pb.FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f"{package}.{kind}"
    else:
        field.type = pb.FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")


def split_raw(data: bytes, field: int) -> tuple[bytes, list[memoryview]]:
    """A message without a repeated field of bytes, and views of that field's values.

    A message is its fields one after the other, so that what is left is a message as well.

    Raises:
        InvalidRequest: It is no message.
    """
    view = memoryview(data)
    tag = field << 3 | 2
    rest: list[memoryview] = []
    found: list[memoryview] = []
    at, kept, end = 0, 0, len(data)
    for _ in range(_MOST_FIELDS):
        if at == end:
            rest.append(view[kept:])
            return b"".join(rest), found
        start = at
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 2:
            size, at = _varint(data, at)
            if size > end - at:
                break
            if key == tag:
                rest.append(view[kept:start])
                found.append(view[at : at + size])
                kept = at + size
            at += size
        elif wire == 0:
            _, at = _varint(data, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
            if at > end:
                break
        else:
            break
    raise InvalidRequest("the message is not what the protocol says")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    for byte in data[at : at + 10]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise InvalidRequest("the message is not what the protocol says")


def join_raw(message: bytes, field: int, values: Sequence[memoryview]) -> bytes:
    """The opposite of `split_raw`."""
    parts: list[bytes | memoryview] = [message]
    for value in values:
        parts += (_encoded(field << 3 | 2) + _encoded(len(value)), value)
    return b"".join(parts)


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
