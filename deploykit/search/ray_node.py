"""What runs on the nodes of a Ray cluster: each process of Ray's has a child that does the jobs, as it does locally.

So a job is alone in its process group, can be ended with all that it started, and finds nothing of Ray around it. Where
Ray's process dies, the child's input ends, and so does the child.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deploykit.search.child import Child, Died, Late
from deploykit.search.ray_files import Cache, pack_folder

# Ray sets it to what a task asks for; other executors do not.
_DROPPED = ("OMP_NUM_THREADS",)

_child: Child | None = None


def perform(told: Mapping[str, Any], timeout_s: float | None, packed: Any, run: str) -> Iterator[dict[str, Any]]:
    """Do a job.

    Args:
        told: As the worker reads it. With "folder" the files are those of this machine.
        timeout_s: Seconds that it may take.
        packed: Its inputs, by `Store.pack`.
        run: Name of the run, for the cache.

    Yields:
        As `Child.ask`; then "wrote" with what it wrote, where that has to travel. Instead of an answer "died" or
        "late".
    """
    global _child
    if _child is None:
        _child = Child(_DROPPED)
    place: Path | None = None
    try:
        if "folder" not in told:
            import ray

            cache = Cache(run)
            place = cache.job()
            inputs = cache.unpack(packed, ray.get, place / "inputs")
            (place / "out").mkdir()
            told = {**told, "folder": str(place / "out"), "inputs": {n: str(p) for n, p in inputs.items()}}
        for found in _child.ask(told, timeout_s):
            yield found
        if place is not None and "value" in found:
            yield {"wrote": pack_folder(place / "out")}
    except Died as exc:
        _child = None
        yield {"died": str(exc)}
    except Late as exc:
        _child = None
        yield {"late": str(exc)}
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


def collect(told: Mapping[str, Any], timeout_s: float | None, packed: Any, run: str) -> list[dict[str, Any]]:
    """All that `perform` yields, for clients that cannot be told meanwhile."""
    return list(perform(told, timeout_s, packed, run))


def clear(run: str) -> None:
    """Remove a run's files from this node."""
    Cache(run).clear()
