"""Whose turn it is."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from deploykit.search.turns import Place, starts


@dataclass
class Wanted:
    exclusive: bool = False
    node: str | None = None


ALONE, ANY = Wanted(exclusive=True), Wanted()


def names(queue, places):
    return [(i, place.name) for i, place in starts(queue, places)]


def test_slots_are_filled_and_no_more():
    assert names([ANY] * 5, [Place("a", 2), Place("b", 1)]) == [(0, "a"), (1, "a"), (2, "b")]


def test_a_measurement_waits_for_an_empty_machine_and_keeps_others_from_it():
    place = Place("a", 2)
    assert names([ANY, ALONE, ANY], [place]) == [(0, "a")]
    place.end()
    assert names([ALONE, ANY], [place]) == [(0, "a")] and place.taken
    assert names([ANY], [place]) == []
    place.end()
    assert names([ANY], [place]) == [(0, "a")]


def test_others_go_on_elsewhere():
    busy = Place("a", 1, running=1)
    assert names([Wanted(True, "a"), ANY, ANY, Wanted(node="a")], [busy, Place("b", 2)]) == [(1, "b"), (2, "b")]
    assert names([ALONE, ANY, ANY], [Place("a", 2, running=1), Place("b", 2)]) == [(0, "b"), (1, "a")]


JOBS = st.lists(st.builds(Wanted, st.booleans(), st.sampled_from([None, "a", "b"])), max_size=12)


@given(JOBS, st.data())
def test_everything_gets_its_turn_and_nothing_runs_beside_a_measurement(jobs, data):
    """Whatever ends first."""
    places = [Place("a", 2), Place("b", 1)]
    queue, running = list(jobs), []
    while queue or running:
        found = list(starts(queue, places))
        running += [(queue[i], place) for i, place in found]
        queue = [job for i, job in enumerate(queue) if i not in {n for n, _ in found}]
        for place in places:
            here = [job for job, where in running if where is place]
            assert len(here) == place.running <= (1 if any(job.exclusive for job in here) else place.slots)
            assert all(job.node in (None, place.name) for job in here)
        assert running, "nothing runs, and something waits"
        _, place = running.pop(data.draw(st.integers(0, len(running) - 1)))
        place.end()


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_a_stream_of_small_jobs_starves_no_measurement(order):
    """While it waits nothing that came after it starts on its machine."""
    place = Place("a", 3, running=2)
    queue = [ALONE, *(Wanted(exclusive) for exclusive in order)]
    assert names(queue, [place]) == []
    place.end()
    assert names(queue, [place]) == []
    place.end()
    assert names(queue, [place]) == [(0, "a")]
