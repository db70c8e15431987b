"""Bodies that no client should send: a 4xx with one line each, and the server goes on."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import zlib
from contextlib import suppress

import numpy as np
import pytest

GOOD = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}
DATA = np.array([1, 2], "<f4").tobytes()
BINARY = {"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}
LENGTH = "Inference-Header-Content-Length"


def said(**change):
    """A good request with something of its input changed; ... takes it away."""
    return {"inputs": [{key: value for key, value in {**GOOD, **change}.items() if value is not ...}]}


def binary(item=BINARY, tail=DATA, length=None, **change):
    head = json.dumps({"inputs": [{**item, **change}]}).encode()
    return head + tail, {LENGTH: str(len(head) if length is None else length)}


def sized(size):
    return {"parameters": {"binary_data_size": size}}


def text(name, *strings, count=None):
    """A request of strings in bytes."""
    tail = b"".join(strings)
    return binary({"name": "x", "datatype": "BYTES", "shape": [count or len(strings)], **sized(len(tail))}, tail)


def compressed(data, encoding):
    return data, {"Content-Encoding": encoding}


WHOLE = json.dumps(said()).encode()
JSON = {
    "nothing": b"",
    "a space": b" ",
    "a zero byte": b"\0",
    "no JSON": b"hello",
    "half an object": b'{"inputs": [',
    "two objects": b'{"inputs": []}{"inputs": []}',
    "a comma too many": b'{"inputs": [],}',
    "a comment": b'{"inputs": []} // mine',
    "single quotes": b"{'inputs': []}",
    "null": b"null",
    "a number": b"7",
    "a string": b'"inputs"',
    "a list": b"[]",
    "true": b"true",
    "a byte order mark": b"\xef\xbb\xbf" + WHOLE,
    "UTF-16": WHOLE.decode().encode("utf-16"),
    "no UTF-8": b'{"id": "\xff", "inputs": []}',
    "half a surrogate": b'{"id": "\\ud800", "inputs": []}',
    "a control character": b'{"id": "\n", "inputs": []}',
    "XML": b"<inputs/>",
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00",
    "a form": b"inputs=1",
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "NaN": b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [NaN]}]}',
    "Infinity": b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [Infinity]}]}',
    "-Infinity": b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [-Infinity]}]}',
    "1e999": b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1e999]}]}',
    "a hexadecimal number": b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [0x1], "data": [1]}]}',
    "a number with a plus": b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [+1], "data": [1]}]}',
    "lists 500 deep": b'{"inputs": ' + b"[" * 500 + b"]" * 500 + b"}",
    "lists 5000 deep": b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "objects 5000 deep": b'{"inputs": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
    "open lists": b"[" * 1_000_000,
    "open objects": b'{"a":' * 500_000,
    "very many lists": b'{"inputs": [' + b"[]," * 1_200_000 + b"[]]}",
    "very many values": b'{"inputs": [' + b"0," * 9_000_000 + b"0]}",
    "a number of a million digits": b'{"inputs": [' + b"9" * 1_000_000 + b"]}",
}
OBJECTS = {
    "no inputs": {},
    "inputs are null": {"inputs": None},
    "inputs are an object": {"inputs": {}},
    "inputs are a string": {"inputs": "x"},
    "inputs are a number": {"inputs": 1},
    "an input is null": {"inputs": [None]},
    "an input is a list": {"inputs": [[]]},
    "an input is a string": {"inputs": ["x"]},
    "no input at all": {"inputs": []},
    "no name": said(name=...),
    "name is null": said(name=None),
    "name is a number": said(name=1),
    "name is a list": said(name=["x"]),
    "name is empty": said(name=""),
    "another name": said(name="z"),
    "a long name": said(name="z" * 100_000),
    "a name with a terminal's escape": said(name="\x1b[31mz"),
    "the same input twice": {"inputs": [GOOD, GOOD]},
    "an input too many": {"inputs": [GOOD, {**GOOD, "name": "z"}]},
    "100 inputs": {"inputs": [{**GOOD, "name": str(i)} for i in range(100)]},
    "no datatype": said(datatype=...),
    "datatype is null": said(datatype=None),
    "datatype is a number": said(datatype=32),
    "datatype is a list": said(datatype=["FP32"]),
    "datatype is an object": said(datatype={"FP32": 1}),
    "datatype in small letters": said(datatype="fp32"),
    "datatype of numpy": said(datatype="float32"),
    "datatype of Triton's configuration": said(datatype="TYPE_FP32"),
    "datatype that is no type": said(datatype="FP128"),
    "datatype of another type": said(datatype="INT32"),
    "datatype of another size": said(datatype="FP64"),
    "datatype of strings": said(datatype="BYTES", data=["a", "b"]),
    "no shape": said(shape=...),
    "shape is null": said(shape=None),
    "shape is a number": said(shape=2),
    "shape is a string": said(shape="2"),
    "shape is an object": said(shape={"0": 2}),
    "a negative dimension": said(shape=[-2]),
    "two negative dimensions": said(shape=[-1, -2]),
    "a free dimension": said(shape=[-1]),
    "a dimension that is a fraction": said(shape=[2.0]),
    "a dimension that is a string": said(shape=["2"]),
    "a dimension that is true": said(shape=[True, 2]),
    "a dimension that is null": said(shape=[None]),
    "a dimension that is a list": said(shape=[[2]]),
    "a dimension of 2**63": said(shape=[2**63]),
    "a dimension of 2**64": said(shape=[2**64]),
    "a dimension of 2**200": said(shape=[2**200]),
    "a product that is 0 modulo 2**64": said(shape=[2**32, 2**32]),
    "a product that is 2 modulo 2**64": said(shape=[2, 2**63 + 1]),
    "an empty tensor of huge size": said(shape=[0, 2**62], data=[]),
    "a tensor of 2**40 elements": said(shape=[2**20, 2**20]),
    "a shape too large": said(shape=[3]),
    "a shape too small": said(shape=[1]),
    "another rank": said(shape=[1, 2]),
    "100 dimensions": said(shape=[1] * 99 + [2]),
    "100000 dimensions": said(shape=[1] * 100_000),
    "no data": said(data=...),
    "data are null": said(data=None),
    "data are a number": said(data=1.5),
    "data are a string": said(data="AACAPw=="),
    "data are an object": said(data={"0": 1}),
    "a value that is null": said(data=[1, None]),
    "a value that is a string": said(data=[1, "2"]),
    "a value that is a word": said(data=[1, "NaN"]),
    "a value that is true": said(data=[1, True]),
    "a value that is an object": said(data=[1, {}]),
    "a value that is a list": said(data=[1, [2]]),
    "a list that is a value": said(data=[[1], 2]),
    "a value too few": said(data=[1]),
    "a value too many": said(data=[1, 2, 3]),
    "a value beyond FP32": said(data=[1, 1e39]),
    "ragged data": said(shape=[2, 2], data=[[1, 2], [3]]),
    "data nested too deep": said(data=[[[1]], [[2]]]),
    "data nested otherwise": said(shape=[2, 3], data=[[1, 2], [3, 4], [5, 6]]),
    "data nested 900 deep": said(shape=[1] * 20, data=json.loads("[" * 900 + "]" * 900)),
    "an object among the lists": said(shape=[2, 1], data=[[1], {"a": 1}]),
    "parameters are a list": {**said(), "parameters": []},
    "parameters are a string": {**said(), "parameters": "a"},
    "a parameter is null": {**said(), "parameters": {"a": None}},
    "a parameter is a list": {**said(), "parameters": {"a": []}},
    "a parameter is an object": {**said(), "parameters": {"a": {}}},
    "1000 parameters": {**said(), "parameters": {str(i): i for i in range(1000)}},
    "timeout is a word": {**said(), "parameters": {"timeout": "soon"}},
    "timeout is negative": {**said(), "parameters": {"timeout": -1}},
    "timeout is a fraction": {**said(), "parameters": {"timeout": 1.5}},
    "timeout is true": {**said(), "parameters": {"timeout": True}},
    "binary_data_output is a word": {**said(), "parameters": {"binary_data_output": "true"}},
    "binary_data_output is a number": {**said(), "parameters": {"binary_data_output": 1}},
    "a sequence": {**said(), "parameters": {"sequence_id": 5, "sequence_start": True}},
    "parameters of an input are a list": said(parameters=[1]),
    "parameters of an input are deep": said(parameters={"a": {"b": {"c": 1}}}),
    "shared memory": said(data=..., parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8}),
    "shared memory beside data": said(parameters={"shared_memory_region": "/dev/shm/x"}),
    "id is a number": {**said(), "id": 7},
    "id is a list": {**said(), "id": ["7"]},
    "id is long": {**said(), "id": "7" * 100_000},
    "outputs are a string": {**said(), "outputs": "y"},
    "outputs are an object": {**said(), "outputs": {"name": "y"}},
    "an output is a string": {**said(), "outputs": ["y"]},
    "an output is null": {**said(), "outputs": [None]},
    "an output without a name": {**said(), "outputs": [{}]},
    "an output that there is not": {**said(), "outputs": [{"name": "w"}]},
    "an output twice": {**said(), "outputs": [{"name": "y"}, {"name": "y"}]},
    "1000 outputs": {**said(), "outputs": [{"name": str(i)} for i in range(1000)]},
    "binary_data is a word": {**said(), "outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]},
    "classes are asked for": {**said(), "outputs": [{"name": "y", "parameters": {"classification": 3}}]},
    "an output in shared memory": {**said(), "outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]},
    "an unknown field that is deep": {**said(), "extra": {"a": [1, 2, {"b": []}]}},
    "binary_data_size without data": said(data=..., parameters={"binary_data_size": 8}),
}
INTEGERS = {
    "a fraction": [1.5],
    "a whole number with a point": [1.0],
    "beyond the top": [2**31],
    "beyond the bottom": [-(2**31) - 1],
    "beyond 64 bits": [2**64],
    "true": [True],
    "a string": ["1"],
    "an exponent": [1e3],
}
BYTES = {
    "length is negative": binary(length=-1),
    "length is a word": binary(length="all"),
    "length is a fraction": binary(length="10.0"),
    "length is hexadecimal": binary(length="0x10"),
    "length has a plus": binary(length="+10"),
    "length has spaces": binary(length="1 0"),
    "length has an underscore": binary(length="1_0"),
    "length is two numbers": binary(length="10, 10"),
    "length is in other digits": binary(length="\u00b2"),
    "length is empty": binary(length=""),
    "length is nothing": binary(length=0),
    "length is one": binary(length=1),
    "length is beyond the body": binary(length=10_000),
    "length is beyond 64 bits": binary(length=2**64),
    "length of a thousand digits": binary(length="9" * 1000),
    "length is one too small": binary(length=len(json.dumps({"inputs": [BINARY]})) - 1),
    "length is one too large": binary(length=len(json.dumps({"inputs": [BINARY]})) + 1),
    "bytes without a length": (binary()[0], {}),
    "a byte too few": binary(tail=DATA[:-1]),
    "a byte too many": binary(tail=DATA + b"\0"),
    "no bytes": binary(tail=b""),
    "size too small": binary(**sized(4)),
    "size too large": binary(**sized(12)),
    "size beyond all": binary(**sized(2**63)),
    "size is negative": binary(**sized(-8)),
    "size is a fraction": binary(**sized(8.0)),
    "size is a string": binary(**sized("8")),
    "size is true": binary(**sized(True)),
    "size is nothing": binary(**sized(0)),
    "size and data": binary(data=[1, 2]),
    "another type of the same size": binary(datatype="INT32"),
    "a type of other size": binary(datatype="FP64"),
    "a shape of other size": binary(shape=[3]),
    "two inputs over one another": (
        (b := json.dumps({"inputs": [BINARY, {**BINARY, "name": "z"}]}).encode()) + DATA,
        {LENGTH: str(len(b))},
    ),
}
STRINGS = {
    "no length": text("x", b"", count=1),
    "half a length": text("x", b"\1\0"),
    "a length beyond the end": text("x", b"\5\0\0\0ab"),
    "a length beyond 31 bits": text("x", b"\xff\xff\xff\xff"),
    "a length that is negative": text("x", b"\xff\xff\xff\xffabc"),
    "bytes behind the last": text("x", b"\1\0\0\0ab"),
    "a string too few": text("x", b"\1\0\0\0a", count=2),
    "a string too many": text("x", b"\1\0\0\0a\1\0\0\0b", count=1),
    "a big-endian length": text("x", b"\0\0\0\1a"),
    "no UTF-8": text("x", b"\2\0\0\0\xc3\x28"),
    "a surrogate": text("x", b"\3\0\0\0\xed\xa0\x80"),
    "a million strings of nothing": text("x", b"\1\0\0\0a", count=1_000_000),
}
ENCODED = {
    "gzip that is plain": compressed(WHOLE, "gzip"),
    "deflate that is plain": compressed(WHOLE, "deflate"),
    "gzip that is deflate": compressed(zlib.compress(WHOLE), "gzip"),
    "deflate that is gzip": compressed(gzip.compress(WHOLE), "deflate"),
    "gzip cut short": compressed(gzip.compress(WHOLE)[:-9], "gzip"),
    "gzip without its end": compressed(gzip.compress(WHOLE)[:-8], "gzip"),
    "gzip with a wrong sum": compressed(gzip.compress(WHOLE)[:-8] + bytes(8), "gzip"),
    "gzip with more behind it": compressed(gzip.compress(WHOLE) + b"more", "gzip"),
    "gzip twice behind one another": compressed(gzip.compress(WHOLE) * 2, "gzip"),
    "gzip in gzip": compressed(gzip.compress(gzip.compress(WHOLE)), "gzip"),
    "gzip of nothing": compressed(gzip.compress(b""), "gzip"),
    "nothing as gzip": compressed(b"", "gzip"),
    "a bomb": compressed(gzip.compress(bytes(100 * 2**20)), "gzip"),
    "a bomb in deflate": compressed(zlib.compress(bytes(100 * 2**20)), "deflate"),
    "a bomb of lists": compressed(gzip.compress(b"[" * 2**23), "gzip"),
    "brotli": compressed(WHOLE, "br"),
    "two encodings": compressed(WHOLE, "gzip, gzip"),
    "an encoding that there is not": compressed(WHOLE, "snake-oil"),
}
CASES = [
    *((f"json: {name}", "nan", body, {}) for name, body in JSON.items()),
    *((f"object: {name}", "nan", json.dumps(body).encode(), {}) for name, body in OBJECTS.items()),
    *(
        (f"integer: {name}", "echo_INT32", json.dumps(said(datatype="INT32", shape=[1], data=data)).encode(), {})
        for name, data in INTEGERS.items()
    ),
    ("unsigned: negative", "echo_UINT8", json.dumps(said(datatype="UINT8", shape=[1], data=[-1])).encode(), {}),
    ("bool: a number", "echo_BOOL", json.dumps(said(datatype="BOOL", shape=[1], data=[1])).encode(), {}),
    ("bool: another byte", "echo_BOOL", *binary({**BINARY, "datatype": "BOOL", "shape": [8]}, b"\0\1\2\3\4\5\6\7")),
    ("half: too large", "echo_FP16", json.dumps(said(datatype="FP16", shape=[1], data=[65520])).encode(), {}),
    ("brain: too large", "echo_BF16", json.dumps(said(datatype="BF16", shape=[1], data=[3.4e38 * 2])).encode(), {}),
    ("text: a number", "echo_BYTES", json.dumps(said(datatype="BYTES", shape=[1], data=[1])).encode(), {}),
    *((f"bytes: {name}", "nan", *case) for name, case in BYTES.items()),
    *((f"strings: {name}", "echo_BYTES", *case) for name, case in STRINGS.items()),
    *((f"encoded: {name}", "nan", *case) for name, case in ENCODED.items()),
    ("size: beyond the declared shape", "mean", b" " * 5_000_000, {}),
    ("model: none", "nothing", WHOLE, {}),
    ("model: a version that there is not", "nan/versions/7", WHOLE, {}),
    ("model: a version that is no number", "nan/versions/newest", WHOLE, {}),
    ("model: a path", "..%2f..%2fetc%2fpasswd", WHOLE, {}),
    ("model: a zero byte", "nan%00", WHOLE, {}),
    ("model: a very long name", "n" * 5000, WHOLE, {}),
]


def post(port, model, body, headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.putrequest("POST", f"/v2/models/{model}/infer")
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            connection.putheader(name, value.encode("utf-8"))
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def check_good(port):
    status, answer = post(port, "nan", WHOLE, {})
    assert status == 200, answer
    status, answer = post(port, "nan", *binary())
    assert status == 200, answer


def test_there_are_enough_cases():
    assert len(CASES) == len({name for name, *_ in CASES}) >= 200


@pytest.mark.parametrize(("model", "body", "headers"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_malformed(served, model, body, headers):
    status, answer = post(served.port, model, body, headers)
    assert 400 <= status < 500, (status, answer)
    said = json.loads(answer)
    assert list(said) == ["error"]
    assert 0 < len(said["error"]) <= 1000 and said["error"].isprintable() and "Traceback" not in said["error"]
    check_good(served.port)


POST = b"POST /v2/models/nan/infer HTTP/1.1\r\n"
RAW = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "HTTP/2 without asking": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "another version": b"POST /v2/models/nan/infer HTTP/9.9\r\n\r\n",
    "a header without a name": POST + b": x\r\n\r\n",
    "Content-Length twice": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "Content-Length is negative": POST + b"Content-Length: -5\r\n\r\nhello",
    "Content-Length is a word": POST + b"Content-Length: five\r\n\r\nhello",
    "Content-Length is beyond 64 bits": POST + b"Content-Length: 99999999999999999999\r\n\r\n",
    "Content-Length is beyond the limit": POST + b"Content-Length: 99999999999\r\n\r\n",
    "both lengths": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk without a size": POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nhello\r\n",
    "a chunk of negative size": POST + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n",
    "a chunk of huge size": POST + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffffff\r\n",
    "no chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no body": POST + b"\r\n",
    "a line feed in the address": b"POST /v2/models/nan\x0b/infer HTTP/1.1\r\n\r\n",
    "headers without end": POST + b"A: " + b"a" * 200_000,
    "very many headers": POST + b"A: b\r\n" * 100_000,
    "an address without end": b"POST /v2/" + b"a" * 200_000,
    "another method": b"DELETE /v2/models/nan/infer HTTP/1.1\r\n\r\n",
    "GET of what is posted": b"GET /v2/models/nan/infer HTTP/1.1\r\n\r\n",
    "POST of what is got": b"POST /v2/models/nan HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "no such route": b"GET /v3 HTTP/1.1\r\n\r\n",
    "the root": b"GET / HTTP/1.1\r\n\r\n",
    "a slash at the end": b"GET /v2/ HTTP/1.1\r\n\r\n",
    "a path upwards": b"GET /v2/models/../../etc/passwd HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("data", RAW.values(), ids=RAW)
def test_malformed_http(served, data):
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as sock:
        with suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert 400 <= response.status < 500
        assert list(json.loads(response.read())) == ["error"]
    check_good(served.port)
