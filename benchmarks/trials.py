"""Two ways to run a model, in turns in this process: quick evidence for a finding, never a verdict of a benchmark."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import deploykit
from deploykit.benchmarks.outputs import read_outputs, write_feeds
from deploykit.runtimes import Session, open_session
from deploykit.specs import Feeds

_TURNS = 9
_UNCLEAR, _CHANCE = 1.05, 0.05
_BLOCK_S, _FEWEST = 0.02, 2
# Thread pools spin for a while after a run; the other side must not pay for that.
_PAUSE_S = 0.02
_TOTAL_S, _TOTAL_RUNS, _WARMUP = 0.4, 7, 3
_SLOW_S, _FEW_TURNS = 0.15, 5
_OPENED_S = 0.15
_CHILD_S = 600.0


@dataclass(frozen=True, slots=True)
class Trial:
    """What running one way and the other gave.

    Attributes:
        first_ms: Milliseconds of the first way: the median over turns.
        second_ms: Of the second.
        ratio: How many times as fast the second is: median over turns.
        low: A lower bound of the median ratio by the sign test at 5 %: above 1, the second is faster and not by chance.
    """

    first_ms: float
    second_ms: float
    ratio: float
    low: float

    def gains(self, least: float) -> bool:
        """Whether the second is faster by a factor, and not by chance."""
        return self.ratio >= least and self.low > 1

    @property
    def saved_us(self) -> float:
        """Microseconds that the second saves in one run, by the ratio: single medians drift with the machine."""
        return self.first_ms * (1 - 1 / self.ratio) * 1e3 if self.ratio > 0 else 0.0


def in_turns(first: Callable[[], object], second: Callable[[], object], *, quick: bool = True) -> Trial:
    """Run two things in alternating blocks; the one that begins changes with every turn.

    Args:
        first: One.
        second: The other.
        quick: Compare the first quartiles of the blocks, which a neighbour disturbs least; else their means, where
            being disturbed is what is asked about.
    """
    once = max(_warm(first), _warm(second))
    turns = _TURNS if once < _SLOW_S else _FEW_TURNS
    count = max(_FEWEST, min(50, int(_BLOCK_S / max(once, 1e-6))))
    pairs: list[tuple[float, ...]] = []
    # A difference that noise hides is looked at once more.
    while not pairs or (len(pairs) == turns and (found := _trial(pairs)).ratio >= _UNCLEAR and found.low <= 1):
        for turn in range(turns):
            order = (first, second) if turn % 2 == 0 else (second, first)
            times = [_block(run, count, quick=quick) for run in order]
            pairs.append(tuple(times if turn % 2 == 0 else reversed(times)))
    # Who looks twice is fooled twice as often: the second look is the stricter one.
    return _trial(pairs, _CHANCE if len(pairs) == turns else _CHANCE / 2)


def one_after_another(first: Callable[[], Session], second: Callable[[], Session], feeds: Feeds) -> Trial:
    """Two ways that would disturb each other if both were loaded, as large thread pools do; means, not medians.

    Threads that are put off show in few runs that take very long: a median would hide them.
    """
    pairs = []
    for turn in range(_FEW_TURNS):
        order = (first, second) if turn % 2 == 0 else (second, first)
        times = [_opened(make, feeds) for make in order]
        pairs.append(tuple(times if turn % 2 == 0 else reversed(times)))
    return _trial(pairs)


def _opened(make: Callable[[], Session], feeds: Feeds) -> float:
    with make() as session:
        for _ in range(_WARMUP):
            session.run(feeds)
        began, runs = time.perf_counter(), 0
        while runs < _FEWEST or time.perf_counter() - began < _OPENED_S:
            session.run(feeds)
            runs += 1
        return (time.perf_counter() - began) / runs


def _trial(pairs: Sequence[tuple[float, ...]], chance: float = _CHANCE) -> Trial:
    ratios = sorted(a / b for a, b in pairs)
    low = ratios[_sign_rank(len(ratios), chance)]
    return Trial(median(a for a, _ in pairs) * 1e3, median(b for _, b in pairs) * 1e3, median(ratios), low)


def _sign_rank(count: int, chance: float = _CHANCE) -> int:
    """The place among sorted ratios that lies above 1 with this chance at most where things are equal (sign test)."""
    rank, ways = 0, 1 + count
    while ways <= chance * 2**count:
        rank += 1
        ways += math.comb(count, rank + 1)
    return rank


def _warm(run: Callable[[], object]) -> float:
    run()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _block(run: Callable[[], object], count: int, *, quick: bool) -> float:
    time.sleep(_PAUSE_S)
    run()
    found = []
    for _ in range(count):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return float(np.percentile(found, 25) if quick else np.mean(found))


def whole_runs_us(run: Callable[[], object]) -> tuple[float, float]:
    """Median and first decile of whole runs in microseconds, over about half a second of them."""
    for _ in range(_WARMUP):
        run()
    found: list[float] = []
    end = time.perf_counter() + _TOTAL_S
    while len(found) < _TOTAL_RUNS or time.perf_counter() < end:
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return median(found) * 1e6, float(np.percentile(found, 10)) * 1e6


# --- a fresh process a side -------------------------------------------------------------------------------------------


def in_processes(
    path: Path,
    device: str,
    feeds: Feeds,
    threads: int,
    precision: str,
    settings: Sequence[Mapping[str, Any]],
    least: float,
    *,
    optimize: bool | str = True,
) -> Trial | None:
    """Two settings that a process can only be given once, such as how it treats denormals; None where one fails.

    Where the first turn shows less than `least` times as much speed, it is the only one.
    """
    pairs: list[tuple[float, ...]] = []
    with tempfile.TemporaryDirectory(prefix="deploykit-trial-") as folder:
        place = Path(folder) / "feeds.npz"
        write_feeds(place, [feeds])
        for turn in range(_FEW_TURNS):
            if pairs and pairs[0][0] < least * pairs[0][1]:
                return Trial(pairs[0][0] * 1e3, pairs[0][1] * 1e3, pairs[0][0] / pairs[0][1], 0.0)
            order = settings if turn % 2 == 0 else settings[::-1]
            times = [_child(path, device, place, threads, precision, chosen, optimize) for chosen in order]
            if any(t is None for t in times):
                return None
            pairs.append(tuple(t for t in (times if turn % 2 == 0 else times[::-1]) if t is not None))
    return _trial(pairs)


def _child(
    path: Path,
    device: str,
    feeds: Path,
    threads: int,
    precision: str,
    settings: Mapping[str, Any],
    optimize: bool | str,
) -> float | None:
    job = {
        "model": str(path), "device": device, "feeds": str(feeds), "threads": threads, "precision": precision,
        "settings": dict(settings), "optimize": optimize,
    }  # fmt: skip
    home = str(Path(deploykit.__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "deploykit.benchmarks.trials", json.dumps(job, default=str)],
            capture_output=True, text=True, errors="replace", env=env, check=False, stdin=subprocess.DEVNULL,
            timeout=_CHILD_S,
        )  # fmt: skip
        return float(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError):
        return None


def main(text: str) -> int:
    """The child: print the seconds of one run."""
    job = json.loads(text)
    (feeds,) = read_outputs(Path(job["feeds"]))
    with open_session(
        job["model"], job["device"], threads=job["threads"], precision=job["precision"], settings=job["settings"],
        optimize=job["optimize"],
    ) as session:  # fmt: skip
        sys.stdout.write(str(whole_runs_us(lambda: session.run(feeds))[0] / 1e6))
    return 0


# --- who else is running ----------------------------------------------------------------------------------------------


class LoadMeter:
    """How many cores other processes keep busy between its start and `others`."""

    def __init__(self) -> None:
        self._began = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Wall-clock time, CPU seconds of the machine, CPU seconds of this process."""
        busy = 0.0
        try:
            with Path("/proc/stat").open(encoding="ascii") as file:
                fields = [int(n) for n in file.readline().split()[1:]]
            # user, nice, system, irq, softirq, steal; idle and waiting for disks are not busy
            ticks = sum(fields[:3]) + sum(fields[5:8])
            busy = ticks / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            busy = 0.0
        own = os.times()
        return time.perf_counter(), busy, own.user + own.system

    def others(self) -> float | None:
        """Cores that others kept busy; None where the kernel does not say."""
        now = self._now()
        wall, busy, own = (b - a for a, b in zip(self._began, now, strict=True))
        return None if not now[1] or wall <= 0 else max(0.0, (busy - own) / wall)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
