"""Run a model over data and look at its tensors, on all cores.

Where the runtime lets several threads run one session, each core takes a piece of a batch: it runs it alone and looks
at what came out while that is in its cache. Threads inside a run would wait for each other after every layer, and stand
still while the outputs are looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from deploykit.machine import allowed_cores
from deploykit.optimizers.base import Opener, Run, SharedOpener
from deploykit.optimizers.histogram import Histogram, Look, look_at
from deploykit.specs import Array, Feeds

# Watched tensors of one run, where it may be cut to that, and of all runs that are under way.
_PIECE_BYTES = 96 << 20
_LIVE_BYTES = 384 << 20


def watch(
    open_model: Opener,
    path: Path,
    seen: Mapping[str, Histogram],
    batches: Iterable[Feeds],
    *,
    counted: bool = True,
    divisible: bool = False,
    cores: int | None = None,
) -> int:
    """Run a model and fill histograms of its inputs and outputs.

    Which piece a value is in decides whether it is counted. That hangs on the batch's shape alone: not on other
    batches, and not on the number of cores.

    Args:
        open_model: Opens a model file; as a `SharedOpener`, for all cores to run it at once.
        path: The model.
        seen: By the name of an input or output; added to.
        batches: Feeds, each dropped as soon as it is seen.
        counted: Whether values are counted, or only their extremes followed.
        divisible: Whether the model takes batches of any size, so that they may be cut.
        cores: How many threads; None for all cores allowed.

    Returns:
        How many rows there were.
    """
    crew = _Crew(open_model, path, tuple(seen), counted, divisible, cores or allowed_cores())
    under_way: deque[Future[dict[str, Look]]] = deque()
    rows = 0

    def add(looks: Mapping[str, Look]) -> None:
        for name, look in looks.items():
            seen[name].add(look)

    with _Threads(crew.cores) as threads:
        for feeds in batches:
            rows += _size(feeds)
            step, width = crew.plan(feeds, threads.now())
            pool = threads.holding(width)
            # With every core at work, more pieces lie ready: nobody waits while what others saw is counted.
            depth = 2 * width if width == crew.cores else width
            for piece in _pieces(feeds, step):
                while len(under_way) >= depth:
                    add(under_way.popleft().result())
                if width > 1:
                    under_way.append(pool.submit(crew.look, piece))
                else:
                    add(crew.look(piece, pool))
        while under_way:
            add(under_way.popleft().result())
    return rows


class _Threads:
    """A pool of threads, each of which may keep what its latest run gave: there are never more than may be held.

    Args:
        cores: Threads where nothing is kept.
    """

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._count = cores
        self._keep = False
        self._pool = ThreadPoolExecutor(cores)

    def now(self) -> ThreadPoolExecutor:
        """The threads that are there."""
        return self._pool

    def holding(self, width: int) -> ThreadPoolExecutor:
        """Threads for so many pieces at a time; with other ones goes all that they kept. For 1 they keep nothing."""
        count, keep = (width, True) if width > 1 else (self._cores, False)
        if count != self._count or (self._keep and not keep):
            self._pool.shutdown()
            self._pool = ThreadPoolExecutor(count)
        self._count, self._keep = count, keep
        return self._pool

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.shutdown()


class _Crew:
    """What the threads do, the sessions that they run, and what is known of each shape."""

    def __init__(
        self, open_model: Opener, path: Path, tensors: tuple[str, ...], counted: bool, divisible: bool, cores: int
    ) -> None:
        self.cores = cores
        self._open_model = open_model
        self._path = path
        self._tensors = tensors
        self._counted = counted
        self._divisible = divisible
        self._sizes: dict[Any, int] = {}  # bytes that come out of one row, or of a batch that may not be cut
        self._whole: Run | None = None  # one run uses all cores
        self._shared: Run | None = None  # one run uses one core
        if cores > 1 and isinstance(open_model, SharedOpener):
            self._shared = open_model.shared(path)

    def plan(self, feeds: Feeds, pool: ThreadPoolExecutor) -> tuple[int, int]:
        """Rows of a piece, and how many pieces are under way at a time."""
        shape, size = self._shape(feeds), _size(feeds)
        if shape not in self._sizes:
            if not self._divisible:
                return size, 1
            row = {n: a[:1] for n, a in feeds.items()}
            # By one of those that run pieces: what a run gives may stay with the thread that ran it.
            self._sizes[shape] = pool.submit(lambda: _bytes(self._tensors_of(row, alone=False))).result()
        one = max(1, self._sizes[shape])
        step = min(size, max(1, _PIECE_BYTES // one)) if self._divisible else size
        width = min(self.cores, _LIVE_BYTES // (one * step if self._divisible else one))
        # With few pieces that may be held, cores would have nothing to do.
        return step, width if self._shared is not None and width * 2 >= self.cores else 1

    def look(self, feeds: Feeds, pool: ThreadPoolExecutor | None = None) -> dict[str, Look]:
        """Run a piece, and look at the tensors: on one core, or on all of them where a pool is given."""
        arrays = self._tensors_of(feeds, alone=pool is not None)
        if not self._divisible:
            self._sizes[self._shape(feeds)] = _bytes(arrays)
        looks = (pool.map if pool else map)(partial(look_at, count=self._counted), arrays)
        return dict(zip(self._tensors, looks, strict=True))

    def _tensors_of(self, feeds: Feeds, *, alone: bool) -> list[Array]:
        run = None if alone else self._shared
        if run is None:
            run = self._whole = self._whole or self._open_model(self._path)
        outputs = run(feeds)
        return [np.asarray(outputs[name] if name in outputs else feeds[name]) for name in self._tensors]

    def _shape(self, feeds: Feeds) -> Any:
        return tuple((n, a.shape[1:] if self._divisible else a.shape) for n, a in sorted(feeds.items()))


def _size(feeds: Feeds) -> int:
    return len(next(iter(feeds.values())))


def _bytes(arrays: Iterable[Array]) -> int:
    return sum(a.nbytes for a in arrays)


def _pieces(feeds: Feeds, step: int) -> Iterator[Feeds]:
    size = _size(feeds)
    if step >= size:
        yield feeds
        return
    for start in range(0, size, step):
        yield {n: a[start : start + step] for n, a in feeds.items()}
