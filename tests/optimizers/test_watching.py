"""Watching tensors on several cores: the same bits whatever the number, within bounds, errors told."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest

from deploykit.errors import InferenceError
from deploykit.optimizers import watching
from deploykit.optimizers.histogram import Histogram
from deploykit.optimizers.watching import watch

NAMES = ("x", "wide", "sign")


class Opener:
    """A model of numpy functions, which tells how it was opened and run."""

    def __init__(self, shared=True, fails=None):
        self.may_share = shared
        self.fails = fails
        self.opened, self.rows = [], []
        self.running, self.most = Counter(), Counter()
        self.threads = {}
        self.lock = threading.Lock()

    def __call__(self, path):
        return self._open("whole")

    def shared(self, path):
        return self._open("shared") if self.may_share else None

    def _open(self, how):
        self.opened.append(how)

        def run(feeds):
            with self.lock:
                self.rows.append(len(feeds["x"]))
                self.threads.setdefault(feeds["x"].shape[1:], set()).add(threading.current_thread())
                self.running[how] += 1
                self.most[how] = max(self.most[how], self.running[how])
            try:
                if len(self.rows) == self.fails:
                    raise InferenceError("out of order")
                threading.Event().wait(0.002)
                x = feeds["x"]
                return {"wide": np.tanh(np.repeat(x, 3, axis=-1)), "sign": np.sign(x).astype(np.float16)}
            finally:
                with self.lock:
                    self.running[how] -= 1

        return run


def plain(path):
    """An opener that knows of no sharing."""
    return Opener()._open("whole")


def batches(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=shape).astype(np.float32)} for shape in shapes]


def watched(opener, data, tmp_path, **options):
    seen = {name: Histogram() for name in NAMES}
    rows = watch(opener, tmp_path, seen, data, **{"divisible": True, **options})
    for tensor in seen.values():
        tensor.settle()
    return rows, seen


def same(first, second):
    for name in NAMES:
        a, b = first[name], second[name]
        assert (a.low, a.high, a.count, a.nonfinite, a.hidden) == (b.low, b.high, b.count, b.nonfinite, b.hidden)
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.counts, b.counts)


@pytest.fixture
def small_pieces(monkeypatch):
    """A row of 40,000 floats, its three-fold and its halves take 720 kB: pieces of two rows."""
    monkeypatch.setattr(watching, "_PIECE_BYTES", 1_500_000)


SHAPES = [(5, 40_000), (1, 40_000), (3, 200, 30), (8, 40_000), (3, 200, 30)]


@pytest.mark.parametrize("divisible", [True, False])
def test_any_number_of_cores_gives_the_same_bits(tmp_path, small_pieces, divisible):
    data = batches(*SHAPES)
    rows, expected = watched(plain, data, tmp_path, cores=1, divisible=divisible)
    assert rows == 20 and expected["x"].count == sum(f["x"].size for f in data)
    for opener, cores in ((plain, 3), (Opener(), 1), (Opener(), 2), (Opener(), 5), (Opener(shared=False), 4)):
        found = watched(opener, data, tmp_path, cores=cores, divisible=divisible)
        assert found[0] == rows
        same(found[1], expected)


def test_batches_do_not_hang_on_each_other(tmp_path, small_pieces):
    data = batches(*SHAPES)
    _, whole = watched(Opener(), data, tmp_path, cores=3)
    _, merged = watched(Opener(), data[3:], tmp_path, cores=2)
    for part in (data[:1], data[1:3]):
        _, seen = watched(Opener(), part, tmp_path, cores=2)
        for name in NAMES:
            merged[name].merge(seen[name])
    same(merged, whole)


def test_batches_are_cut_and_run_at_once(tmp_path, small_pieces):
    opener = Opener()
    watched(opener, batches((7, 40_000), (7, 40_000)), tmp_path, cores=2)
    assert opener.opened == ["shared"] and opener.most["shared"] == 2
    assert Counter(opener.rows) == {1: 3, 2: 6}  # the first row alone tells how large a row is
    opener = Opener()
    watched(opener, batches((7, 40_000), (7, 40_000)), tmp_path, cores=2, divisible=False)
    assert opener.rows == [7, 7]


def test_what_is_held_at_a_time_is_bounded(tmp_path, small_pieces, monkeypatch):
    monkeypatch.setattr(watching, "_LIVE_BYTES", 3 * 1_500_000)
    opener = Opener()
    watched(opener, batches((20, 40_000)), tmp_path, cores=6)
    assert opener.most["shared"] == 3
    # Too few to keep all cores busy: one run uses them all.
    opener = Opener()
    watched(opener, batches((20, 40_000)), tmp_path, cores=7)
    assert opener.opened == ["shared", "whole"] and opener.most["whole"] == 1


def test_no_more_threads_run_pieces_than_may_be_held(tmp_path, monkeypatch):
    """Each keeps the outputs of its latest run, also while it has nothing to do."""
    monkeypatch.setattr(watching, "_PIECE_BYTES", 1_500_000)
    monkeypatch.setattr(watching, "_LIVE_BYTES", 3 * 1_500_000)
    small, large = (4, 4000), (40, 40_000)
    opener = Opener()
    watched(opener, batches(*[small] * 12, large, *[small] * 12), tmp_path, cores=5)
    assert opener.opened == ["shared"] and opener.most["shared"] == 5
    assert len(opener.threads[large[1:]]) <= 3 + 1  # one tells how large a row is


def test_what_threads_kept_goes_before_one_run_has_it_all(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "_LIVE_BYTES", 1_500_000)
    opener, kept = Opener(), []
    small, huge = (4, 4000), (2, 400_000)

    def stream():
        yield from batches(small, small, huge)
        kept.extend(t for t in opener.threads[small[1:]] if t.is_alive())

    watched(opener, stream(), tmp_path, cores=3)
    assert opener.opened == ["shared", "whole"] and not kept


def test_one_core_needs_no_sharing(tmp_path):
    opener = Opener()
    watched(opener, batches((4, 10)), tmp_path, cores=1)
    assert opener.opened == ["whole"]


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("fails", [1, 4])
def test_a_run_that_fails_is_told_and_leaves_no_thread(tmp_path, small_pieces, cores, fails):
    before = threading.active_count()
    with pytest.raises(InferenceError, match="out of order"):
        watched(Opener(fails=fails), batches((20, 40_000)), tmp_path, cores=cores)
    assert threading.active_count() == before


def test_extremes_alone_fill_no_bins(tmp_path):
    _, seen = watched(Opener(), batches((4, 10)), tmp_path, cores=2, counted=False)
    assert seen["wide"].count == 120 and seen["wide"].low < 0 < seen["wide"].high and not seen["wide"].codes.size
