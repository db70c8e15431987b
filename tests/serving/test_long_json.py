"""Long JSON: read and written in threads, in pieces, to the same end as at once."""

from __future__ import annotations

import http.client
import json
import threading
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.serving import http_app, v2_json, v2_numbers
from deploykit.serving.requests import InvalidRequest, RequestError
from deploykit.serving.v2_json import parse_request
from deploykit.serving.v2_types import Limits

unhurried = settings(deadline=None, derandomize=True)


# --- the event loop goes on ------------------------------------------------------------------------------------------


def ask(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def text_of(count, more=b""):
    data = b",".join([b"0.12345678", b"-350.000001"] * (count // 2))
    return b'{"inputs":[{"name":"x","datatype":"FP32","shape":[%d],"data":[%b]}]%b}' % (count, data, more)


class Gate:
    """Has work of the server wait until the test lets it go on."""

    def __init__(self, real):
        self.real = real
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

    def __call__(self, *args, **kwargs):
        self.entered.release()
        assert self.opened.wait(30), "the event loop waits for its own work"
        return self.real(*args, **kwargs)


@pytest.mark.parametrize(("work", "count"), [("parse_request", 1_800_000), ("write_response", 20_000)])
def test_health_answers_while_long_json_is_read_or_written(served, monkeypatch, work, count):
    """The work goes on only once health has answered: on the event loop, both would wait for ever."""
    gate = Gate(getattr(http_app, work))
    monkeypatch.setattr(http_app, work, gate)
    body = text_of(count, b',"parameters":{"binary_data_output":true}' if work == "parse_request" else b"")
    assert len(body) > 20_000_000 or work == "write_response"
    found = []
    asking = threading.Thread(target=lambda: found.append(ask(served.port, "POST", "/v2/models/echo_FP32/infer", body)))
    asking.start()
    assert gate.entered.acquire(timeout=30)
    assert ask(served.port, "GET", "/v2/health/ready")[0] == 200
    gate.opened.set()
    asking.join(60)
    status, answer = found[0]
    assert status == 200
    if work == "parse_request":
        values = np.frombuffer(answer[-4 * count :], "<f4")
    else:
        values = np.array(orjson.loads(answer)["outputs"][0]["data"], np.float32)
    np.testing.assert_array_equal(values, np.tile(np.array([0.12345678, -350.000001], np.float32), count // 2))


def test_so_many_at_once_and_no_more(served, monkeypatch):
    gate = Gate(http_app.parse_request)
    monkeypatch.setattr(http_app, "parse_request", gate)
    body = text_of(20_000)
    assert len(body) > http_app._LONG_BYTES
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(served.port, "POST", "/v2/models/echo_FP32/infer", body)[0]))
        for _ in range(http_app._THREADS + 2)
    ]
    for thread in threads:
        thread.start()
    for _ in range(http_app._THREADS):
        assert gate.entered.acquire(timeout=30)
    assert not gate.entered.acquire(timeout=0.2)
    assert ask(served.port, "GET", "/v2/health/live")[0] == 200
    gate.opened.set()
    for thread in threads:
        thread.join(60)
    assert found == [200] * len(threads)


def test_what_is_wrong_in_a_thread_is_told_as_ever(served):
    status, answer = ask(served.port, "POST", "/v2/models/echo_FP32/infer", text_of(100_000)[:-3])
    assert status == 400 and "is not JSON" in json.loads(answer)["error"]


# --- pieces ----------------------------------------------------------------------------------------------------------


@contextmanager
def small_pieces(least=4, piece=3):
    with (
        patch.object(v2_json, "LEAST_BYTES", least),
        patch.object(v2_numbers, "LEAST_BYTES", least),
        patch.object(v2_numbers, "_PIECE_BYTES", piece),
        patch.object(v2_numbers.time, "sleep"),
    ):
        yield


def read(text):
    """The input's values, or that there are none."""
    try:
        request, _ = parse_request(memoryview(text), None, model="m", version=None, limits=Limits())
    except RequestError as exc:
        return type(exc)
    return {name: (a.dtype, a.shape, a.tolist()) for name, a in request.inputs.items()}, request.outputs, request.id


TOKENS = [
    b"1", b"2.5", b"-3", b"0", b" 7 ", b"1e400", b"4e38", b"300", b"01", b"1 2", b"", b" ", b"\x0b", b"true", b"null",
    b"[1]", b"[", b"]", b"{}", b"}", b'"a"', b'"data"', b'"data":[1,2,3,4]', b"NaN",
]  # fmt: skip
PLACES = [
    b'{"inputs":[{"name":"x","datatype":"%b","shape":[%d],"data":[%b]}]}',
    b'{"inputs":[{"name":"x","datatype":"%b","shape":[%d],"data" :\n [%b] }], "id": "\\"data\\":[1,2,3,4,5]"}',
    b'{"inputs":[{"name":"x","datatype":"%b","shape":[%d],"data":[1,2,3],"data":[%b]}]}',
    b'{"inputs":[{"data":[%3$b],"name":"x","datatype":"%1$b","shape":[%2$d],"data":[1,2,3]}]}',
    b'{"inputs":[{"name":"x","datatype":"%b","shape":[%d],"data":[%b]}],"data":[1,2,3,4,5]}',
    b'{"inputs":[{"name":"x","datatype":"%b","shape":[%d],"data":[%b],"parameters":{"data":[1,2,3,4]}}]}',
    b'{"inputs":[{"name":"x","datatype":"%b","shape":[%d],"data":[%b]}],"outputs":[{"name":"y","data":[1,2,3,4]}]}',
    b'{"inputs":[{"name":"x","datatype":"%b","shape":[%d],"x\\"data":[1,2,3,4],"data":[%b]}]}',
    b'{"inputs":[{"name":"x","datatype":"%b","shape":[1,%d],"data":[[%b]]}]}',
]


def fill(place, datatype, count, data):
    if b"$" in place:
        return place.replace(b"%1$b", datatype).replace(b"%2$d", b"%d" % count).replace(b"%3$b", data)
    return place % (datatype, count, data)


@unhurried
@given(
    st.sampled_from(PLACES),
    st.sampled_from([b"FP32", b"FP16", b"BF16", b"INT8", b"UINT64", b"BOOL", b"BYTES"]),
    st.one_of(st.lists(st.sampled_from(TOKENS[:4]), max_size=9), st.lists(st.sampled_from(TOKENS), max_size=9)),
    st.sampled_from([0, 0, 0, 1, -1]),
    st.integers(1, 8),
)
def test_pieces_give_what_the_whole_gives(place, datatype, tokens, more, piece):
    text = fill(place, datatype, max(0, len(tokens) + more), b",".join(tokens))
    whole = read(text)
    with small_pieces(piece=piece):
        assert read(text) == whole


@unhurried
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.sampled_from([(",", ""), (" ,\n", " ")]),
    st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(["", "[", "]", ",", " ", "1", "{", "},"])), max_size=2),
    st.integers(1, 8),
)
def test_nested_lists_in_pieces(dims, shape, form, changes, piece):
    """Of the shape that is declared, or of another; whole, or damaged."""
    comma, blank = form

    def nest(inner):
        if not inner:
            return "7"
        return f"[{blank}{comma.join([nest(inner[1:])] * inner[0])}{blank}]"

    data = nest(dims)
    for at, new in changes:
        at %= len(data)
        data = data[:at] + new + data[at + 1 :]
    for declared in (dims, shape):
        head = f'{{"inputs":[{{"name":"x","datatype":"INT8","shape":{declared},"data":'
        text = f"{head}{data}}}]}}".encode()
        whole = read(text)
        with small_pieces(piece=piece):
            assert read(text) == whole


def test_every_place_is_read_in_pieces():
    """So that the test above compares two ways and not one with itself."""
    taken = []
    for place in PLACES:
        _, lists = v2_numbers.set_aside(fill(place, b"FP32", 3, b"1," * 200_000 + b"1"))
        taken.append(len(lists))
    assert taken == [1] * len(PLACES)


def test_a_long_list_lets_others_in_between(monkeypatch):
    pauses = []
    monkeypatch.setattr(v2_numbers.time, "sleep", pauses.append)
    (values, _, _) = read(text_of(200_000))
    assert values["x"][1] == (200_000,) and len(pauses) >= 10
    read_in = len(pauses)
    array = np.arange(100_000, dtype=np.float32)
    assert v2_numbers.dump_numbers(array) == orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)
    assert len(pauses) - read_in >= 5


@pytest.mark.parametrize("array", [np.zeros(0), np.array([1, np.nan]), np.arange(7) > 2, np.arange(9, dtype="u8")])
def test_numbers_are_written_as_at_once(monkeypatch, array):
    monkeypatch.setattr(v2_numbers, "_PIECE_VALUES", 2)
    assert v2_numbers.dump_numbers(array) == orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)


def test_keys_without_end_are_not_followed_without_end():
    text = b'"data":[' * 1_000_000
    assert v2_numbers.set_aside(text) == (text, {})
    with pytest.raises(InvalidRequest):
        parse_request(memoryview(text), None, model="m", version=None, limits=Limits(json_lists=2_000_000))
