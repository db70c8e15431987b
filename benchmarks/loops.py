"""How requests are sent: one after the other, several at a time, or when a schedule says so.

A closed loop sends the next request when the last one is answered: it measures a latency, and cannot see a queue. An
open loop sends at times that were drawn before, and counts from those: a stall then costs every request that had to
wait for it, not just one (G. Tene's "coordinated omission"; MLPerf LoadGen's server scenario).
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Call = Callable[[Any], object]
Clock = Callable[[], int]
Sleep = Callable[[float], None]

# The scheduler wakes a sleeper up to this much late; the rest is waited for awake.
_AWAKE_NS = 200_000


@dataclass(frozen=True, slots=True)
class Timed:
    """What a loop measured.

    Attributes:
        samples_ns: Latency of every request, in the order of their ends (closed loop) or of their intended starts.
        wall_ns: From the first start to the last end.
        cursor: Which input comes next.
        ends_ns: How long each callable was at work, of several at a time.
    """

    samples_ns: list[int]
    wall_ns: int
    cursor: int = 0
    ends_ns: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return {"samples_ns": self.samples_ns, "wall_ns": self.wall_ns}


def closed_loop(
    run: Call, feeds: Sequence[Any], seconds: float, *, start: int = 0, clock: Clock = time.perf_counter_ns
) -> Timed:
    """One request in flight, for at least one request and until ``seconds`` are over.

    Args:
        run: Sends a request and waits for its answer.
        feeds: Inputs to rotate through.
        seconds: For how long.
        start: The first input's number.
        clock: Nanoseconds.
    """
    count, index = len(feeds), start % len(feeds)
    samples: list[int] = []
    append = samples.append
    started = clock()
    end = started + int(seconds * 1e9)
    while True:
        began = clock()
        run(feeds[index])
        now = clock()
        append(now - began)
        index = index + 1 if index + 1 < count else 0
        if now >= end:
            return Timed(samples, now - started, index)


def concurrent_loop(
    runs: Sequence[Call], feeds: Sequence[Any], seconds: float, *, start: int = 0, clock: Clock = time.perf_counter_ns
) -> Timed:
    """As many requests in flight as there are callables, each in a thread of its own.

    Throughput is requests over wall time: the time ends with the last answer.

    Raises:
        Exception: What the first failing request raised.
    """
    if len(runs) == 1:
        return closed_loop(runs[0], feeds, seconds, start=start, clock=clock)
    found: list[Timed | BaseException | None] = [None] * len(runs)
    began: list[int] = []
    # The clock starts before anyone is let go: on busy cores this thread wakes long after the others.
    gate = threading.Barrier(len(runs) + 1, action=lambda: began.append(clock()))

    def work(place: int) -> None:
        gate.wait()
        try:
            found[place] = closed_loop(runs[place], feeds, seconds, start=start + place, clock=clock)
        except BaseException as exc:  # noqa: BLE001 - handed to the caller's thread
            found[place] = exc

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(len(runs))]
    for thread in threads:
        thread.start()
    gate.wait()
    for thread in threads:
        thread.join()
    wall = clock() - began[0]
    ended: list[tuple[int, int]] = []
    ends: list[int] = []
    for one in found:
        if isinstance(one, BaseException):
            raise one
        if one is not None:
            ended += zip(itertools.accumulate(one.samples_ns), one.samples_ns, strict=True)
            ends.append(one.wall_ns)
    samples = [taken for _, taken in sorted(ended)]
    return Timed(samples, wall, (start + len(samples)) % len(feeds), tuple(ends))


def poisson_schedule(rate_per_s: float, queries: int, seed: int) -> list[int]:
    """Intended starts in nanoseconds from the beginning: a Poisson process of this rate.

    Args:
        rate_per_s: Mean arrivals in a second.
        queries: How many.
        seed: Of the draw.
    """
    gaps = np.random.default_rng(seed).exponential(1e9 / rate_per_s, queries)
    return [int(t) for t in np.cumsum(gaps)]


def open_loop(
    runs: Sequence[Call],
    feeds: Sequence[Any],
    schedule: Sequence[int],
    *,
    objective_ns: int | None = None,
    clock: Clock = time.perf_counter_ns,
    sleep: Sleep = time.sleep,
) -> Timed:
    """Send every request at its intended time, or as soon after as a callable is free; latency counts from the former.

    Args:
        runs: As many requests can be served at a time.
        feeds: Inputs to rotate through.
        schedule: Intended starts, ascending, in nanoseconds from the beginning.
        objective_ns: End as soon as more than one in a hundred of all requests has taken longer: their 99th percentile
            cannot meet it any more. What is left is not sent.
        clock: Nanoseconds.
        sleep: Seconds.

    Raises:
        Exception: What the first failing request raised.
    """
    latencies: list[int | None] = [None] * len(schedule)
    taken = iter(range(len(schedule)))
    lock, stop = threading.Lock(), threading.Event()
    failures: list[BaseException] = []
    # The nearest-rank 99th percentile of n values is the one that n - ceil(0.99 n) others are above.
    allowed, late = len(schedule) - math.ceil(0.99 * len(schedule)), 0
    beginning = clock()

    def work(run: Call) -> None:
        nonlocal late
        while not stop.is_set():
            with lock:
                number = next(taken, None)
            if number is None:
                return
            intended = beginning + schedule[number]
            wait_until(intended, clock, sleep)
            run(feeds[number % len(feeds)])
            taken_ns = latencies[number] = clock() - intended
            if objective_ns is not None and taken_ns > objective_ns:
                with lock:
                    late += 1
                if late > allowed:
                    stop.set()

    def guarded(run: Call) -> None:
        try:
            work(run)
        except BaseException as exc:  # noqa: BLE001 - handed to the caller's thread
            failures.append(exc)
            stop.set()

    if len(runs) == 1:
        work(runs[0])
    else:
        threads = [threading.Thread(target=guarded, args=(run,), daemon=True) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return Timed([n for n in latencies if n is not None], clock() - beginning)


def wait_until(when: int, clock: Clock, sleep: Sleep) -> None:
    """Sleep most of the time until ``when``, and watch the clock for the rest."""
    while (left := when - clock()) > 0:
        if left > _AWAKE_NS:
            sleep((left - _AWAKE_NS) / 1e9)
