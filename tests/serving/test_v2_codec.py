"""Bodies to arrays and back, and what is refused on the way."""

from __future__ import annotations

import json
import struct
from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deploykit.errors import ModelError
from deploykit.serving.requests import InferResult, InvalidRequest, RequestError, TooLarge
from deploykit.serving.v2_binary import read_tensor, write_tensor
from deploykit.serving.v2_json import Wanted, parse_object, parse_request, write_response
from deploykit.serving.v2_types import (
    DATATYPES,
    DTYPES,
    SIZES,
    Limits,
    check_shape,
    datatype_of,
    metadata,
    numpy_dtype,
)
from deploykit.specs import DTYPES as OURS
from deploykit.specs import TensorSpec

LIMITS = Limits()
unhurried = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
NUMBERS = sorted(set(DTYPES) - {"BYTES", "BF16"})
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def numbers(datatype):
    return hnp.arrays(np.dtype(DTYPES[datatype]), shapes)


strings = shapes.flatmap(
    lambda shape: st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        min_size=int(np.prod(shape)),
        max_size=int(np.prod(shape)),
    ).map(lambda items: np.array([*items, None], object)[:-1].reshape(shape))
)
tensors = st.one_of(
    st.sampled_from(NUMBERS).flatmap(numbers),
    hnp.arrays(np.float32, shapes, elements=st.floats(width=32)).map(lambda a: a.astype(ml_dtypes.bfloat16)),
    strings,
)


def datatype(array):
    return "BYTES" if array.dtype == object else DATATYPES[array.dtype.name]


def same(left, right):
    assert left.dtype == right.dtype and left.shape == right.shape
    if left.dtype == object:
        assert left.tolist() == right.tolist()
    else:
        assert np.ascontiguousarray(left).tobytes() == np.ascontiguousarray(right).tobytes()


def ask(body, length=None, limits=LIMITS):
    return parse_request(memoryview(body), length, model="m", version=None, limits=limits)


def body_of(arrays, binary=(), **rest):
    inputs, tail = [], b""
    for name, array in arrays.items():
        item = {"name": name, "datatype": datatype(array), "shape": list(array.shape)}
        if name in binary:
            data = bytes(write_tensor(array))
            item["parameters"] = {"binary_data_size": len(data)}
            tail += data
        else:
            item["data"] = array.astype(np.float32).tolist() if datatype(array) == "BF16" else array.tolist()
            if not array.shape:
                item["data"] = [item["data"]]
        inputs.append(item)
    head = json.dumps({"inputs": inputs, **rest}).encode()
    return head + tail, len(head)


def answer(outputs, wanted):
    return write_response(InferResult("m", "1", outputs, "i", 0.0, 0.0, 0), wanted)


def test_every_dtype_of_ours_but_complex_has_a_datatype():
    assert set(DATATYPES) == {d for d in OURS if not d.startswith("complex")} and set(SIZES) == set(DTYPES)
    with pytest.raises(ModelError, match="complex64 has no name"):
        datatype_of("complex64")


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"BYTES"}))
def test_numbers_lie_little_endian_and_of_their_size(name):
    dtype = numpy_dtype(name)
    assert dtype.itemsize == SIZES[name] and not dtype.str.startswith(">")


def test_metadata_says_minus_one_for_free_dimensions():
    assert metadata(TensorSpec("x", "bfloat16", ("n", 3, "a + 1"))) == {
        "name": "x",
        "datatype": "BF16",
        "shape": [-1, 3, -1],
    }
    assert metadata(TensorSpec("x", "string", None))["shape"] == [-1]


@unhurried
@given(tensors)
def test_bytes_hold_a_tensor(array):
    data = write_tensor(array)
    same(read_tensor("x", datatype(array), array.shape, array.size, data), array)
    if array.dtype != object:
        assert len(data) == array.size * SIZES[datatype(array)]


@unhurried
@given(tensors)
def test_a_request_holds_a_tensor_as_bytes(array):
    body, length = body_of({"x": array}, binary=("x",), parameters={"binary_data_output": True}, id="7")
    request, wanted = ask(body, length)
    same(request.inputs["x"], array)
    assert wanted == Wanted(True) and request.id == "7" and request.outputs is None and request.parameters == {}


@unhurried
@given(tensors, st.booleans())
def test_a_request_holds_a_tensor_as_json(array, flat):
    finite = array.dtype == object or np.isfinite(array.astype(np.float64)).all()
    body, _ = body_of({"x": array.reshape(-1) if flat else array})
    if flat:
        said = json.loads(body)
        said["inputs"][0]["shape"] = list(array.shape)
        body = json.dumps(said).encode()
    if finite:
        same(ask(body)[0].inputs["x"], array)
    else:
        with pytest.raises(InvalidRequest, match="no NaN and no Infinity"):
            ask(body)


@unhurried
@given(tensors)
def test_an_answer_holds_a_tensor_as_json_and_as_bytes(array):
    head, parts = answer({"y": array}, Wanted(True))
    said = json.loads(head)
    assert said["id"] == "i" and said["model_name"] == "m" and said["model_version"] == "1"
    (output,) = said["outputs"]
    assert output["shape"] == list(array.shape) and output["datatype"] == datatype(array)
    assert output["parameters"]["binary_data_size"] == len(parts[0])
    same(read_tensor("y", output["datatype"], array.shape, array.size, parts[0]), array)

    head, parts = answer({"y": array}, Wanted(False))
    (output,) = json.loads(head)["outputs"]
    assert parts == [] and len(output["data"]) == array.size
    if array.dtype == object:
        assert output["data"] == array.reshape(-1).tolist()
    else:
        got = np.array(
            output["data"], np.float32 if array.dtype.kind == "V" or datatype(array) == "BF16" else array.dtype
        )
        np.testing.assert_array_equal(got, array.reshape(-1).astype(got.dtype))


def test_what_numpy_calls_a_string_is_bytes():
    for array in (np.array(["ab", "ä"]), np.array([b"ab", "ä".encode()]), np.array([b"ab", "ä"], object)):
        assert bytes(write_tensor(array)) == b"\2\0\0\0ab\2\0\0\0\xc3\xa4"
        assert json.loads(answer({"y": array}, Wanted())[0])["outputs"][0]["data"] == ["ab", "ä"]


def test_other_byte_orders_and_strides_are_written_as_the_protocol_says():
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    assert bytes(write_tensor(array)) == np.array([0, 3, 1, 4, 2, 5], "<i4").tobytes()
    assert json.loads(answer({"y": array}, Wanted())[0])["outputs"][0]["data"] == [0, 3, 1, 4, 2, 5]


def test_numbers_are_not_copied():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    data = write_tensor(array)
    assert np.shares_memory(np.frombuffer(data, np.uint8), array)
    body, length = body_of({"x": array}, binary=("x",))
    held = np.frombuffer(body, np.uint8)
    assert np.shares_memory(ask(body, length)[0].inputs["x"], held)


def test_nan_is_null_and_infinity_is_a_word():
    nan = answer({"y": np.array([1.5, np.nan], np.float32)}, Wanted())[0]
    assert json.loads(nan)["outputs"][0]["data"] == [1.5, None] and b"NaN" not in nan
    words = answer({"y": np.array([np.nan, np.inf, -np.inf, 0.5], np.float32)}, Wanted())[0]
    assert b"[NaN,Infinity,-Infinity,0.5]" in words
    array = np.array([[1e-30, np.inf], [-3.25e20, 0.1]], np.float32)
    found = np.array(json.loads(answer({"y": array}, Wanted())[0])["outputs"][0]["data"], np.float32)
    np.testing.assert_array_equal(found, array.ravel())


def test_float32_is_written_with_the_digits_of_float32():
    assert b'"data":[0.1]' in answer({"y": np.array([0.1], np.float32)}, Wanted())[0]


def test_each_output_in_its_own_form():
    body, _ = body_of(
        {"x": np.zeros(1, np.float32)},
        outputs=[{"name": "a", "parameters": {"binary_data": False}}, {"name": "b"}],
        parameters={"binary_data_output": True, "timeout": 0, "mine": "yes"},
    )
    request, wanted = ask(body)
    assert request.outputs == ("a", "b") and wanted.outputs == {"a": False, "b": True}
    assert request.deadline is None and request.parameters == {"mine": "yes"}
    head, parts = answer({"a": np.array([1]), "b": np.array([2])}, wanted)
    first, second = json.loads(head)["outputs"]
    assert first["data"] == [1] and second["parameters"] == {"binary_data_size": 8} and len(parts) == 1


def test_null_is_as_good_as_nothing():
    array = np.zeros(1, np.float32)
    body, length = body_of({"x": array}, binary=("x",), id=None, parameters=None, outputs=None)
    said = json.loads(body[:length])
    said["inputs"][0]["data"] = None
    head = json.dumps(said).encode()
    request, wanted = ask(head + body[length:], len(head))
    same(request.inputs["x"], array)
    assert request.id == "" and request.outputs is None and wanted == Wanted()


# Limits.


def test_shapes_have_limits():
    limits = Limits(elements=100, dims=3)
    assert check_shape("x", [2, 0, 3], limits) == ((2, 0, 3), 0)
    for shape, error in (([101], TooLarge), ([10, 11], TooLarge), ([0, 2**60], TooLarge), ([1] * 4, InvalidRequest)):
        with pytest.raises(error):
            check_shape("x", shape, limits)
    for dim in (-1, 1.0, "3", None, True, [2], 2**70):
        with pytest.raises(RequestError):
            check_shape("x", [dim], limits)


def of(*inputs, outputs=(), max_batch=0, **limits):
    return Limits(**limits).of(inputs, outputs, max_batch)


def test_fixed_shapes_make_the_limit_of_a_body():
    small = of(TensorSpec("x", "float32", (1, 3, 224, 224)))
    assert 150528 * 26 < small.body_bytes < 2 * 150528 * 26, "numbers in JSON, and little more"
    assert of(TensorSpec("x", "float32", ("n", 3, 224, 224))).body_bytes == Limits().body_bytes
    assert of(TensorSpec("x", "float32", None)).body_bytes == Limits().body_bytes


def test_no_limit_is_too_small_for_what_a_model_declares():
    huge = of(TensorSpec("x", "float64", (2**26,)))
    assert huge.body_bytes >= 2**29 and huge.elements == 2**26
    batched = of(TensorSpec("x", "uint8", ("n", 2**20)), max_batch=128)
    assert batched.body_bytes >= 2**27 and batched.elements >= 2**27
    many = of(*(TensorSpec(f"x{i}", "float32", (1,)) for i in range(200)))
    assert many.tensors == 200
    assert of(TensorSpec("x", "bool", (1,) * 40)).dims == 40
    assert of(TensorSpec("x", "float32", (1000,)), elements=10, body_bytes=10).elements == 1000


def test_without_the_library_for_it_bfloat16_is_refused_and_no_fault_of_ours(monkeypatch):
    monkeypatch.setattr("deploykit.serving.v2_types.available", lambda name: name != "ml_dtypes")
    item = {"name": "x", "datatype": "BF16", "shape": [1], "data": [1.0]}
    with pytest.raises(InvalidRequest, match="datatype of 'x' is BF16; expected that of a model"):
        parse_request(
            memoryview(json.dumps({"inputs": [item]}).encode()), None, model="m", version=None, limits=Limits()
        )


@pytest.mark.parametrize("text", ["[" * 2000, '{"a":' * 2000, "[" * 2_000_000], ids=["lists", "objects", "many"])
def test_deep_json_is_refused(text):
    with pytest.raises(RequestError):
        parse_object(text.encode(), LIMITS)
    with pytest.raises(RequestError):
        parse_object((text + text.replace("[", "]").replace('{"a":', "}")).encode(), LIMITS)


def test_json_that_would_fill_the_memory_is_not_parsed():
    with pytest.raises(TooLarge, match="too many lists"):
        parse_object(b'{"a":[' + b"[]," * 50 + b"[]]}", Limits(json_lists=50))
    with pytest.raises(TooLarge, match="too many values"):
        parse_object(b'{"a":[' + b"0," * 50 + b"0]}", Limits(json_values=49))
    assert parse_object(b'{"a":[' + b"0," * 50 + b"0]}", Limits(json_values=50))


def test_limits_of_names():
    limits = Limits(tensors=2, parameters=1)
    item = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    for said in (
        {"inputs": [{**item, "name": str(i)} for i in range(3)]},
        {"inputs": [item], "outputs": [{"name": str(i)} for i in range(3)]},
        {"inputs": [item], "parameters": {"a": 1, "b": 2}},
        {"inputs": [{**item, "parameters": {"a": 1, "b": 2}}]},
    ):
        with pytest.raises(InvalidRequest, match="at most"):
            ask(json.dumps(said).encode(), limits=limits)


# Whatever comes, it is refused in our words or understood.


@unhurried
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 220)))
def test_any_bytes(body, length):
    with suppress(RequestError):
        ask(body, length)


leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
inputs = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.one_of(st.sampled_from("xyz"), anything),
            "datatype": st.one_of(st.sampled_from(sorted(DTYPES)), anything),
            "shape": st.one_of(st.lists(st.integers(-1, 3), max_size=3), anything),
            "data": anything,
            "parameters": st.one_of(st.dictionaries(st.sampled_from(["binary_data_size", "a"]), anything), anything),
        },
    ),
    max_size=3,
)
requests = st.fixed_dictionaries(
    {}, optional={"inputs": st.one_of(inputs, anything), "outputs": anything, "parameters": anything, "id": anything}
)


@unhurried
@given(requests, st.binary(max_size=24))
def test_any_json(said, tail):
    head = json.dumps(said).encode()
    try:
        request, _ = ask(head + tail, len(head))
    except RequestError as exc:
        assert str(exc) and "\n" not in str(exc)
    else:
        assert all(isinstance(array, np.ndarray) for array in request.inputs.values())


@unhurried
@given(st.binary(max_size=40), st.integers(0, 6))
def test_any_bytes_as_strings(data, count):
    try:
        found = read_tensor("x", "BYTES", (count,), count, memoryview(data))
    except InvalidRequest:
        return
    assert bytes(write_tensor(found)) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1",
        b"\1\0\0\0",
        b"\2\0\0\0a",
        b"\xff\xff\xff\xff",
        b"\xff\xff\xff\x7fabc",
        b"\1\0\0\0ab",
        b"\1\0\0\0\xff",
        struct.pack("<I", 1) + b"a" + struct.pack("<I", 0),
    ],
)
def test_strings_whose_lengths_lie(data):
    with pytest.raises(InvalidRequest):
        read_tensor("x", "BYTES", (1,), 1, memoryview(data))


def test_bool_is_zero_or_one():
    with pytest.raises(InvalidRequest, match="other bytes than 0 and 1"):
        read_tensor("x", "BOOL", (2,), 2, memoryview(b"\1\2"))


def test_there_is_a_limit_for_strings():
    limits = Limits(strings=10)
    assert check_shape("x", [2, 5], limits, "BYTES") == ((2, 5), 10)
    assert check_shape("x", [11], limits, "FP32") == ((11,), 11)
    with pytest.raises(TooLarge, match="11 strings"):
        check_shape("x", [11], limits, "BYTES")
    text, number = TensorSpec("x", "string", (20, "n")), TensorSpec("y", "float32", (1000,))
    assert limits.of((text, number), ()).strings == 20
    assert limits.of((number,), ()).strings == 10


def test_strings_of_a_model_that_are_not_utf_8_are_written_as_they_are():
    array = np.array(["ü", b"\xff\xfe", b"\xff\xfe".decode("utf-8", "surrogateescape")], object)
    assert bytes(write_tensor(array)) == b"\2\0\0\0\xc3\xbc" + 2 * b"\2\0\0\0\xff\xfe"
    head, _ = write_response(InferResult("net", "1", {"y": array}, "", 0.0, 0.0, 0), Wanted())
    assert json.loads(head)["outputs"][0]["data"] == ["ü", "\ufffd\ufffd", "\ufffd\ufffd"]
