"""Does an open loop show a stall? python benchmarks/suite/stall.py [--seconds S] [--stall-ms MS] [--rate R]

A session in ONNX Runtime stalls once in the middle of a run, as a garbage collection or a neighbour on the machine
would make it. A closed loop, which sends the next request when the last one is answered, has one slow sample among
thousands, and its 99th percentile does not know of it. The open loop of the scenario `server` counts from the time at
which a request should have been sent: all that arrived during the stall are slow, and the percentile shows it. Printed
are both, with the stall and without. Ends with 1 where the open loop hides it or the closed loop shows it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from verdicts import SIZE, network

from deploykit.benchmarks.loops import Timed, closed_loop, open_loop, poisson_schedule
from deploykit.benchmarks.statistics import percentile
from deploykit.runtimes import Session, open_session
from deploykit.specs import Array

Feeds = dict[str, Array]


def stalling(session: Session, at: int, stall_s: float) -> Callable[[Feeds], object]:
    """A session's run whose ``at``-th call takes longer; 0 for none."""
    count = 0

    def run(feeds: Feeds) -> object:
        nonlocal count
        count += 1
        if count == at:
            time.sleep(stall_s)
        return session.run(feeds)

    return run


def show(title: str, timed: Timed) -> float:
    """Print the percentiles; gives the 99th in milliseconds."""
    samples = np.asarray(timed.samples_ns)
    p50, p99 = (percentile(samples, q) for q in (50.0, 99.0))
    if p50 is None or p99 is None:
        sys.exit("too few requests for a 99th percentile: more --seconds")
    print(f"{title:28} {samples.size:6} requests, p50 {p50 / 1e6:8.3f} ms, p99 {p99 / 1e6:8.3f} ms")
    return p99 / 1e6


def main() -> int:
    """Run all four."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--stall-ms", type=float, default=200.0)
    parser.add_argument("--rate", type=float, default=100.0, help="requests in a second")
    options = parser.parse_args()
    feeds = [{"x": np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)}]
    queries = int(options.seconds * options.rate)
    schedule = poisson_schedule(options.rate, queries, 0)
    found = {}
    with tempfile.TemporaryDirectory() as name, open_session(network(Path(name) / "m.onnx", longer=False)) as session:
        closed_loop(session.run, feeds, 1.0)
        for stalls in (False, True):
            how = f"one stall of {options.stall_ms:g} ms" if stalls else "no stall"

            def run(stalls: bool = stalls) -> Callable[[Feeds], object]:
                return stalling(session, queries // 2 if stalls else 0, options.stall_ms / 1e3)

            found["closed", stalls] = show(f"closed loop, {how}", closed_loop(run(), feeds, options.seconds))
            found["open", stalls] = show(f"open loop, {how}", open_loop([run()], feeds, schedule))
    hidden = found["closed", True] < options.stall_ms / 2
    shown = found["open", True] > options.stall_ms / 2
    print(
        f"the open loop {'shows' if shown else 'HIDES'} the stall; the closed one {'hides' if hidden else 'shows'} it"
    )
    return 0 if shown and hidden else 1


if __name__ == "__main__":
    sys.exit(main())
