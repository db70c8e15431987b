"""One of two that want a request gets it, and never both."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from deploykit.serving.claims import Claims, Offers


@pytest.fixture
def slot():
    """Both sides of one slot, the worker's by a descriptor of its own."""
    offers = Offers()
    theirs = os.dup(offers.descriptor)
    yield offers, Claims(theirs)
    offers.close()
    os.close(theirs)


def test_what_is_offered_is_begun_once(slot):
    offers, claims = slot
    offers.make(1)
    assert claims.take(1)
    assert not offers.take_back()
    offers.make(2)
    assert claims.take(2)


def test_what_is_taken_back_is_not_begun(slot):
    offers, claims = slot
    offers.make(1)
    assert offers.take_back()
    assert not offers.take_back()
    assert not claims.take(1)


def test_a_worker_that_is_late_does_not_take_the_next_request_for_the_last(slot):
    offers, claims = slot
    offers.make(1)
    assert offers.take_back()
    offers.make(2)
    assert not claims.take(1)  # told of it before it was taken back
    assert not offers.take_back()  # the worker is about to begin it
    assert claims.take(2)


def test_one_of_two_at_once_gets_it(slot):
    offers, claims = slot
    took = []
    for number in range(1, 301):
        offers.make(number)
        barrier = threading.Barrier(2)

        def worker(number=number, barrier=barrier):
            barrier.wait()
            took.append(claims.take(number))

        thread = threading.Thread(target=worker)
        thread.start()
        barrier.wait()
        back = offers.take_back()
        thread.join()
        assert took.pop() != back


def test_nothing_stays_open():
    def descriptors():
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before = descriptors()
    offers = Offers()
    offers.close()
    offers.close()
    Offers()  # and nobody keeps it
    assert descriptors() == before
