"""The queue: what is joined, what waits, what is refused; with times that the tests make up."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.serving.batching import Batcher, Policy, Waiting, join, split
from deploykit.serving.requests import Busy, InferRequest
from deploykit.specs import Signature, TensorSpec


def waiting(rows: int, width: int = 4, at: float = 0.0, dtype: str = "float32", id: str = "") -> Waiting:
    inputs = {"x": np.full((rows, width), rows, dtype)}
    return Waiting.of(InferRequest("net", inputs, id=id), at, joins=True)


def batcher(**policy) -> Batcher:
    return Batcher(Policy(**{"max_batch": 8, "limit": 100, **policy}))


def test_without_a_delay_what_waits_runs_together():
    queue = batcher()
    entries = [waiting(1, at=n) for n in range(3)]
    for entry in entries:
        queue.add(entry)
    assert queue.take(0.0) == tuple(entries)
    assert len(queue) == 0
    assert queue.take(0.0) == ()


def test_a_batch_has_no_more_rows_than_allowed_and_nobody_is_overtaken():
    queue = batcher()
    entries = [waiting(5, at=0), waiting(4, at=1), waiting(1, at=2)]
    for entry in entries:
        queue.add(entry)
    assert queue.take(9.0) == (entries[0],)
    assert queue.take(9.0) == (entries[1], entries[2])


def test_more_rows_than_allowed_run_by_themselves():
    queue = batcher()
    large, small = waiting(20, at=0), waiting(1, at=1)
    queue.add(large)
    queue.add(small)
    assert queue.take(9.0) == (large,)
    assert queue.take(9.0) == (small,)


def test_other_shapes_and_dtypes_are_kept_apart_and_the_oldest_goes_first():
    queue = batcher()
    a, b, c = waiting(1, 4, at=2), waiting(1, 5, at=1), waiting(1, 4, at=3)
    d = waiting(1, 4, at=0, dtype="float64")
    d.key = tuple((*k, "float64") for k in d.key)
    for entry in (a, b, c, d):
        queue.add(entry)
    assert queue.take(9.0) == (d,)
    assert queue.take(9.0) == (b,)
    assert queue.take(9.0) == (a, c)


def test_a_request_waits_for_others_until_the_delay_is_over_or_the_batch_is_full():
    queue = batcher(max_batch=2, max_delay_s=1.0)
    first = waiting(1, at=10.0)
    queue.add(first)
    assert queue.take(10.5) == ()
    assert queue.next_due(10.5) == 11.0
    assert queue.take(11.0) == (first,)
    second, third = waiting(1, at=20.0), waiting(1, at=20.1)
    queue.add(second)
    queue.add(third)
    assert queue.next_due(20.1) is None
    assert queue.take(20.1) == (second, third)
    assert queue.next_due(20.1) is None


def test_only_whole_batches_where_a_lane_is_not_free_yet():
    queue = batcher(max_batch=2)
    entries = [waiting(1, at=n) for n in range(3)]
    for entry in entries:
        queue.add(entry)
    assert queue.take(9.0, full=True) == (entries[0], entries[1])
    assert queue.take(9.0, full=True) == ()
    assert queue.take(9.0) == (entries[2],)


def test_rows_that_are_not_to_be_joined_run_one_request_at_a_time():
    queue = batcher(max_batch=1)
    entries = [waiting(1, at=n) for n in range(3)]
    for entry in entries:
        queue.add(entry)
    assert [queue.take(9.0) for _ in range(3)] == [(e,) for e in entries]


@pytest.mark.parametrize(
    "inputs",
    [{"x": np.zeros((0, 4))}, {"x": np.zeros(())}, {"x": np.zeros((1, 4)), "z": np.zeros((2, 4))}],
    ids=["no rows", "scalar", "two numbers of rows"],
)
def test_what_has_no_rows_is_not_joined(inputs):
    queue = batcher()
    odd = [Waiting.of(InferRequest("net", inputs), n, joins=True) for n in range(2)]
    for entry in odd:
        queue.add(entry)
    assert queue.take(9.0) == (odd[0],)


def test_the_queue_is_limited_in_requests():
    queue = batcher(limit=2)
    kept = [waiting(1), waiting(1)]
    for entry in kept:
        queue.add(entry)
    with pytest.raises(Busy, match="2 requests wait"):
        queue.add(waiting(1))
    assert queue.take(0.0) == tuple(kept)
    queue.add(waiting(1))


def test_the_queue_is_limited_in_bytes_and_one_request_may_always_wait():
    queue = batcher(limit_bytes=1000)
    queue.add(waiting(100))
    with pytest.raises(Busy):
        queue.add(waiting(1))
    queue.take(0.0)
    queue.add(waiting(1))
    queue.add(waiting(1))


def test_a_batch_is_limited_in_bytes():
    queue = batcher(max_bytes=300)
    entries = [waiting(1, 20, at=n) for n in range(3)]
    for entry in entries:
        queue.add(entry)
    assert queue.take(9.0) == (entries[0], entries[1])


def test_what_leaves_makes_room_and_is_not_run():
    queue = batcher(limit=2)
    gone, kept = waiting(1), waiting(1)
    queue.add(gone)
    queue.add(kept)
    assert queue.discard(gone)
    assert not queue.discard(gone)
    queue.add(waiting(1))
    assert queue.take(0.0)[0] is kept
    assert not queue.discard(kept)


def test_what_runs_again_runs_alone_and_is_never_refused():
    queue = batcher(limit=1)
    queue.add(waiting(1, at=1))
    again = [waiting(1, at=0), waiting(1, at=0)]
    for entry in again:
        queue.add(entry, again=True)
    assert queue.take(9.0) == (again[0],)
    assert queue.take(9.0) == (again[1],)
    assert len(queue) == 1


def test_clear_takes_all_out():
    queue = batcher()
    entries = [waiting(1, 4), waiting(1, 5)]
    for entry in entries:
        queue.add(entry)
    assert set(queue.clear()) == set(entries)
    assert len(queue) == 0 and queue.take(9.0) == ()


def test_rows_come_back_to_whom_they_belong():
    signature = Signature((TensorSpec("x", "float32", ("n", 4)),), (TensorSpec("y", "float32", ("n",)),))
    batch = tuple(waiting(rows) for rows in (2, 1, 3))
    (joined,) = join(signature, batch)
    assert joined.shape == (6, 4)
    whole = np.concatenate(joined.parts)[:, 0]
    parts = split({"y": whole, "z": whole * 10}, batch)
    assert [p["y"].tolist() for p in parts] == [[2, 2], [1], [3, 3, 3]]
    assert [p["z"].tolist() for p in parts] == [[20, 20], [10], [30, 30, 30]]
    assert split({"y": whole[:5]}, batch) is None
    assert split({"y": np.float32(1).reshape(())}, batch) is None


def test_only_the_outputs_that_are_wanted_are_copied():
    entry = Waiting.of(InferRequest("net", {"x": np.zeros((1, 4))}, outputs=("z",)), 0.0, joins=True)
    source = np.ones(1)
    (part,) = split({"y": source, "z": source}, (entry,))
    source[0] = 5
    assert part.keys() == {"z"} and part["z"][0] == 1
