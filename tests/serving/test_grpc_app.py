"""gRPC beside NVIDIA's client: contents in the fields of their types, bad messages, tokens, health."""

from __future__ import annotations

import struct

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.serving.grpc_messages import HEALTH, RAW_INPUTS, SERVICE, join_raw, messages, split_raw
from deploykit.serving.requests import InvalidRequest, RequestError
from deploykit.serving.v2_types import DTYPES, Limits

MADE = messages()
Input = MADE["ModelInferRequest.InferInputTensor"]
Code = grpc.StatusCode
derandomized = settings(deadline=None, derandomize=True)


def call(channel, method, request, metadata=(), service=SERVICE, answer=None):
    data = request if isinstance(request, bytes) else request.SerializeToString()
    reply = channel.unary_unary(f"/{service}/{method}")(data, timeout=60, metadata=metadata)
    return MADE[answer or f"{method}Response"].FromString(reply)


@pytest.fixture(scope="module")
def channel(served):
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(served.grpc_address, options) as found:
        yield found


def tensor(datatype="FP32", shape=(2,), name="x", **contents):
    return Input(name=name, datatype=datatype, shape=shape, **({"contents": contents} if contents else {}))


def ask(model="nan", inputs=(), raw=(), **rest):
    return MADE["ModelInferRequest"](model_name=model, inputs=inputs, raw_input_contents=raw, **rest)


def refused(channel, request, code=Code.INVALID_ARGUMENT, method="ModelInfer"):
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, request)
    assert caught.value.code() == code, caught.value
    details = caught.value.details()
    assert details and len(details) <= 1000 and "Traceback" not in details
    answer = call(channel, "ModelInfer", ask(inputs=[tensor(fp32_contents=[1, 2])]))
    assert [o.name for o in answer.outputs] == ["y", "z"]
    return details


TYPED = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-(2**15), 2**15 - 1]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 2**16 - 1]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "FP32": ("fp32_contents", [0.5, float("-inf")]),
    "FP64": ("fp64_contents", [0.1, float("inf")]),
    "BYTES": ("bytes_contents", [b"", "süß".encode()]),
}


@pytest.mark.parametrize("datatype", sorted(TYPED))
@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 1, 1)], ids=str)
def test_contents_of_their_type(channel, datatype, shape):
    field, values = TYPED[datatype]
    answer = call(channel, "ModelInfer", ask(f"echo_{datatype}", [tensor(datatype, shape, **{field: values})], id="7"))
    (output,) = answer.outputs
    assert (output.name, output.datatype, tuple(output.shape), answer.id) == ("y", datatype, shape, "7")
    (raw,) = answer.raw_output_contents
    if datatype == "BYTES":
        assert raw == b"".join(struct.pack("<I", len(value)) + value for value in values)
    else:
        assert np.frombuffer(raw, DTYPES[datatype]).tolist() == values


def test_types_without_a_field_need_raw_contents(channel):
    for datatype in ("FP16", "BF16"):
        assert "raw_input_contents" in refused(
            channel, ask(f"echo_{datatype}", [tensor(datatype, fp32_contents=[1, 2])])
        )
    for datatype in DTYPES.keys() - TYPED.keys():
        answer = call(channel, "ModelInfer", ask(f"echo_{datatype}", [tensor(datatype)], [b"\0\x3c\0\x40"]))
        assert list(answer.raw_output_contents) == [b"\0\x3c\0\x40"]


RAW = struct.pack("<ff", 1, 2)
GOOD = ask(inputs=[tensor()], raw=[RAW]).SerializeToString()
BAD = {
    "nothing": (b"", Code.NOT_FOUND),
    "no message": b"\xff" * 20,
    "a tag alone": b"\x0a",
    "a field beyond the end": b"\x0a\xff\x01abc",
    "raw contents beyond the end": b"\x3a\xff\xff\xff\xff\x0fabc",
    "a length without an end": b"\x3a" + b"\xff" * 20,
    "a group": GOOD + b"\x0b\x0c",
    "the end of a group": GOOD + b"\x0c",
    "a wire type that there is not": GOOD + b"\x0e\0",
    "cut short": GOOD[:-1],
    "a fixed field cut short": GOOD + b"\x49\0\0",
    "a field of another type": (b"\x08\x05", Code.NOT_FOUND),
    "no UTF-8": b"\x0a\x02\xff\xfe",
    "very many fields": b"\x60\x01" * 1_000_000,
    "very many raw contents": b"\x3a\0" * 1_000_000,
    "very many inputs": GOOD + b"\x2a\0" * 10_000,
    "no model": (ask("nothing", [tensor()], [RAW]), Code.NOT_FOUND),
    "no version": (ask(inputs=[tensor()], raw=[RAW], model_version="9"), Code.NOT_FOUND),
    "no inputs": ask(),
    "an input too many": ask(inputs=[tensor(), tensor(name="z")], raw=[RAW, RAW]),
    "another input": ask(inputs=[tensor(name="z")], raw=[RAW]),
    "an input without a name": ask(inputs=[tensor(name="")], raw=[RAW]),
    "an input twice": ask(inputs=[tensor(), tensor()], raw=[RAW, RAW]),
    "no contents": ask(inputs=[tensor()]),
    "raw contents too many": ask(inputs=[tensor()], raw=[RAW, RAW]),
    "raw contents too few": ask("pair", [tensor(name="a"), tensor(name="b")], [RAW]),
    "raw and typed": ask(inputs=[tensor(fp32_contents=[1, 2])], raw=[RAW]),
    "a byte too few": ask(inputs=[tensor()], raw=[RAW[:-1]]),
    "a byte too many": ask(inputs=[tensor()], raw=[RAW + b"\0"]),
    "another type": ask(inputs=[tensor("INT32")], raw=[RAW]),
    "no such type": ask(inputs=[tensor("FP128")], raw=[RAW]),
    "no type": ask(inputs=[tensor("")], raw=[RAW]),
    "a negative dimension": ask(inputs=[tensor(shape=(-2,))], raw=[RAW]),
    "two negative dimensions": ask(inputs=[tensor(shape=(-1, -2))], raw=[RAW]),
    "a huge dimension": (ask(inputs=[tensor(shape=(2**62,))], raw=[RAW]), Code.RESOURCE_EXHAUSTED),
    "a product beyond 64 bits": (ask(inputs=[tensor(shape=(2**32, 2**32))], raw=[RAW]), Code.RESOURCE_EXHAUSTED),
    "an empty tensor of huge size": (ask(inputs=[tensor(shape=(0, 2**62))], raw=[b""]), Code.RESOURCE_EXHAUSTED),
    "very many dimensions": ask(inputs=[tensor(shape=[1] * 100_000 + [2])], raw=[RAW]),
    "another rank": ask(inputs=[tensor(shape=(1, 2))], raw=[RAW]),
    "values too few": ask(inputs=[tensor(fp32_contents=[1])]),
    "values too many": ask(inputs=[tensor(fp32_contents=[1, 2, 3])]),
    "values in another field": ask(inputs=[tensor(fp64_contents=[1, 2])]),
    "values in two fields": ask(inputs=[tensor(fp32_contents=[1, 2], int_contents=[1, 2])]),
    "a value beyond INT8": ask("echo_INT8", [tensor("INT8", int_contents=[128, 0])]),
    "a value below UINT8": ask("echo_UINT8", [tensor("UINT8", uint_contents=[256, 0])]),
    "BOOL of other bytes": ask("echo_BOOL", [tensor("BOOL")], [b"\1\2"]),
    "a string that is no UTF-8": ask("echo_BYTES", [tensor("BYTES", bytes_contents=[b"\xff", b""])]),
    "a raw string whose length lies": ask("echo_BYTES", [tensor("BYTES")], [b"\0\0\0\0\xff\0\0\0"]),
    "an output that there is not": ask(inputs=[tensor()], raw=[RAW], outputs=[{"name": "w"}]),
    "an output twice": ask(inputs=[tensor()], raw=[RAW], outputs=[{"name": "y"}, {"name": "y"}]),
    "very many outputs": ask(inputs=[tensor()], raw=[RAW], outputs=[{"name": str(i)} for i in range(1000)]),
    "classes": ask(
        inputs=[tensor()], raw=[RAW], outputs=[{"name": "y", "parameters": {"classification": {"int64_param": 2}}}]
    ),
    "a sequence": ask(inputs=[tensor()], raw=[RAW], parameters={"sequence_id": {"int64_param": 3}}),
    "a timeout that is a word": ask(inputs=[tensor()], raw=[RAW], parameters={"timeout": {"string_param": "soon"}}),
    "a parameter without a value": ask(inputs=[tensor()], raw=[RAW], parameters={"a": {}}),
    "very many parameters": ask(
        inputs=[tensor()], raw=[RAW], parameters={str(i): {"bool_param": True} for i in range(1000)}
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_messages(channel, case):
    refused(channel, *(case if isinstance(case, tuple) else (case,)))


def test_a_message_over_the_limit_is_not_taken(channel, served):
    too_large = ask(inputs=[tensor(shape=(20_000_000,))], raw=[bytes(80_000_000)])
    refused(channel, too_large, Code.RESOURCE_EXHAUSTED)
    refused(channel, ask("mean", [tensor()], [bytes(5_000_000)]), Code.RESOURCE_EXHAUSTED)


def test_a_bomb_is_not_inflated(served):
    with grpc.insecure_channel(served.grpc_address, [("grpc.max_send_message_length", -1)]) as channel:
        send = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        data = ask(inputs=[tensor(shape=(2**27 // 4,))], raw=[bytes(2**27)]).SerializeToString()
        with pytest.raises(grpc.RpcError) as caught:
            send(data, timeout=60, compression=grpc.Compression.Gzip)
        assert caught.value.code() == Code.RESOURCE_EXHAUSTED


def test_a_model_of_large_fixed_shapes_may_be_sent_what_it_declares(running, fake_engine):
    with (
        running(fake_engine(), Limits(body_bytes=10_000)) as served,
        grpc.insecure_channel(served.grpc_address) as channel,
    ):
        array = np.ones((1, 3, 224, 224), np.float32)
        answer = call(channel, "ModelInfer", ask("mean", [tensor(shape=array.shape)], [array.tobytes()]))
        assert np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() == [1, 1, 1]


def test_faults_are_logged_and_not_told(channel, caplog):
    details = refused(channel, ask("bug", [tensor()], [RAW]), Code.INTERNAL)
    assert details == "internal error" and "secret of the bug" in caplog.text


def test_a_deadline_of_the_call_reaches_the_engine(channel, served):
    call(channel, "ModelInfer", ask(inputs=[tensor()], raw=[RAW]))
    assert served.engine.asked[-1].deadline is not None
    channel.unary_unary(f"/{SERVICE}/ModelInfer")(GOOD)
    assert served.engine.asked[-1].deadline is None


def test_what_did_not_reach_the_engine_is_told(channel, served):
    served.engine.refused.clear()
    refused(channel, ask())
    refused(channel, ask(inputs=[tensor()], raw=[b""]))
    refused(channel, ask("nothing"), Code.NOT_FOUND)
    refused(channel, ask("unloaded", [tensor()], [RAW]), Code.UNAVAILABLE)
    told = [("nan", "InvalidRequest"), ("", "UnknownModel"), ("unloaded", "NotReady")]
    assert served.engine.refused == told


def test_the_repository_is_off_unless_asked_for(running, fake_engine):
    engine = fake_engine()
    with running(engine, None) as served, grpc.insecure_channel(served.grpc_address) as channel:
        for method in ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"):
            refused(channel, b"", Code.PERMISSION_DENIED, method)
    assert engine.loaded == engine.unloaded == []


def test_tokens(running, fake_engine):
    with (
        running(fake_engine(), None, tokens=("one", "two")) as served,
        grpc.insecure_channel(served.grpc_address) as channel,
    ):
        for metadata in ((), (("authorization", "Bearer three"),), (("authorization", "one"),), (("token", "one"),)):
            for method in ("ModelInfer", "ModelMetadata", "ServerMetadata", "RepositoryIndex", "ModelReady"):
                with pytest.raises(grpc.RpcError) as caught:
                    call(channel, method, b"", metadata)
                assert caught.value.code() == Code.UNAUTHENTICATED
        assert call(channel, "ServerMetadata", b"", (("authorization", "Bearer two"),)).name == "deploykit"
        assert call(channel, "ServerLive", b"").live and call(channel, "ServerReady", b"").ready
        assert call(channel, "Check", b"", (), HEALTH, "HealthCheckResponse").status == 1


def test_health(running, fake_engine):
    engine = fake_engine()

    def check(channel, service=""):
        request = MADE["HealthCheckRequest"](service=service)
        return call(channel, "Check", request, (), HEALTH, "HealthCheckResponse").status

    with running(engine, None) as served, grpc.insecure_channel(served.grpc_address) as channel:
        assert check(channel) == check(channel, SERVICE) == 1
        assert check(channel, "another") == 3
        engine.is_ready = False
        assert check(channel) == 2 and not call(channel, "ServerReady", b"").ready
        engine.alive = False
        assert not call(channel, "ServerLive", b"").live
        assert not call(channel, "ModelReady", MADE["ModelReadyRequest"](name="loading")).ready
        refused(channel, MADE["ModelReadyRequest"](name="nothing"), Code.NOT_FOUND, "ModelReady")
        refused(channel, MADE["ModelMetadataRequest"](name="nothing"), Code.NOT_FOUND, "ModelMetadata")


def test_metadata_say_whether_requests_are_joined(channel):
    for name, told in (
        ("identity", {"max_batch_size": 8}),
        ("dynamic", {"max_batch_size": 0, "batching": "not joined"}),
    ):
        found = call(channel, "ModelMetadata", MADE["ModelMetadataRequest"](name=name)).parameters
        assert {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in found.items()} == told


# Beside the server.


def test_field_numbers_are_those_of_nvidias_client():
    from tritonclient.grpc import model_config_pb2, service_pb2

    compared = 0
    for name, made in MADE.items():
        files = (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR)
        named = (file.message_types_by_name.get(name.partition(".")[0]) for file in files)
        theirs = next((found for found in named if found is not None), None)
        if theirs is None:
            assert name.startswith("HealthCheck")
            continue
        for part in name.split(".")[1:]:
            theirs = theirs.nested_types_by_name[part]
        for field in made.DESCRIPTOR.fields:
            if (name, field.name) == ("ModelMetadataResponse", "parameters"):  # MLServer's, which NVIDIA's skips
                assert field.number == 6
                continue
            other = theirs.fields_by_name[field.name]
            # Enumerations are numbers here.
            kind = field.TYPE_INT32 if other.type == other.TYPE_ENUM else other.type
            assert (field.number, field.type) == (other.number, kind), f"{name}.{field.name}"
            assert field.is_repeated == (
                other.label == other.LABEL_REPEATED if hasattr(other, "label") else other.is_repeated
            )
            compared += 1
    assert compared > 100


@derandomized
@given(st.lists(st.binary(max_size=300), max_size=5), st.text(max_size=20))
def test_raw_contents_are_split_off_and_joined(values, name):
    request = ask(name, [tensor()], values, id="7")
    rest, found = split_raw(request.SerializeToString(), RAW_INPUTS)
    assert [bytes(value) for value in found] == values
    assert MADE["ModelInferRequest"].FromString(rest) == ask(name, [tensor()], id="7")
    assert MADE["ModelInferRequest"].FromString(join_raw(rest, RAW_INPUTS, found)) == request


@derandomized
@given(st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda data: GOOD + data)))
def test_any_bytes_are_split_or_refused(data):
    from google.protobuf.message import DecodeError

    try:
        rest, found = split_raw(data, RAW_INPUTS)
    except InvalidRequest:
        return
    try:
        whole = MADE["ModelInferRequest"].FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            MADE["ModelInferRequest"].FromString(rest)
        return
    assert [bytes(value) for value in found] == list(whole.raw_input_contents)


@derandomized
@given(st.integers(0, 60), st.integers(0, 255), st.integers(0, 60))
def test_any_change_of_a_good_message(at, byte, cut):
    from deploykit.serving.grpc_app import _parse, _request

    data = bytearray(GOOD)
    data[at % len(data)] = byte
    try:
        rest, raw = split_raw(bytes(data[: len(data) - cut % 3]), RAW_INPUTS)
        _request(_parse("ModelInferRequest", rest), raw, Limits(), None)
    except RequestError as exc:
        assert str(exc)
