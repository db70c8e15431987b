"""The directory of a search, between its writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploykit.errors import OutputExistsError, SearchError, StorageError
from deploykit.search.output import Output
from deploykit.staging import free_lock, take_lock

WISH = {"objective": "latency"}


def state(path: Path, **more: Any) -> None:
    """What an interrupted search left."""
    path.mkdir(exist_ok=True)
    (path / "optimize.json").write_text(json.dumps({"wish": WISH, "state": "running", "run": "1", **more}))


def test_an_abandoned_search_leaves_nothing(tmp_path: Path) -> None:
    with Output(tmp_path / "new", WISH, resume=False) as out:
        out._published = True
        out.abandon()
    assert not (tmp_path / "new").exists()
    state(tmp_path / "old")
    with Output(tmp_path / "old", WISH, resume=True) as out:
        assert out.resumed
        out.abandon()
    assert not (tmp_path / "old").exists()


def test_what_another_search_is_at_is_not_even_looked_at(tmp_path: Path) -> None:
    """It may be at its end, and what it says of itself old."""
    state(tmp_path / "best")
    lock = take_lock(tmp_path / "best")
    assert lock is not None
    with pytest.raises(SearchError, match="another search works in"), Output(tmp_path / "best", WISH, resume=True):
        pass
    free_lock(lock)
    state(tmp_path / "best", state="done")
    with pytest.raises(OutputExistsError, match="finished search"), Output(tmp_path / "best", WISH, resume=True):
        pass
    lock = take_lock(tmp_path / "best")  # it was given back
    assert lock is not None
    free_lock(lock)
    assert (tmp_path / "best" / "optimize.json").exists()


def test_a_measurement_of_the_interrupted_search_does_not_stand_beside_the_new_result(tmp_path: Path) -> None:
    state(tmp_path / "best", state="interrupted")
    (tmp_path / "best" / "benchmark.json").write_text("{}")
    (tmp_path / "best" / "recipe.toml").write_text("old")
    with Output(tmp_path / "best", WISH, resume=True) as out:
        out.publish([], "a", {"state": "done"}, {"recipe.toml": b"new"})
    assert not (tmp_path / "best" / "benchmark.json").exists()
    assert (tmp_path / "best" / "recipe.toml").read_text() == "new"


def test_the_export_of_a_live_module_is_made_anew_when_a_search_goes_on(tmp_path: Path) -> None:
    state(tmp_path / "best")
    (tmp_path / "best" / "source").mkdir()
    with Output(tmp_path / "best", WISH, resume=True) as out:
        assert not out.source().exists()
        assert out.source().parent == tmp_path / "best"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system in which nothing can be made")
def test_a_place_where_nothing_can_be_made_is_an_error_of_the_users() -> None:
    with pytest.raises(StorageError, match="cannot write /proc/nothing"), Output("/proc/nothing", WISH, resume=False):
        pass


def test_what_a_kill_left_half_written_is_removed_when_the_search_goes_on(tmp_path: Path) -> None:
    state(tmp_path / "best")
    (tmp_path / "best" / ".optimize.json.tmp-1").write_text("{")
    with Output(tmp_path / "best", WISH, resume=True):
        assert not (tmp_path / "best" / ".optimize.json.tmp-1").exists()


def test_more_time_is_no_other_search(tmp_path: Path) -> None:
    with Output(tmp_path / "best", {**WISH, "budget_s": 60.0}, resume=False) as out:
        out.write({"state": "interrupted", "winner": None})
        out.resumed = True  # stays
    with Output(tmp_path / "best", {**WISH, "budget_s": 600.0}, resume=True) as out:
        assert out.resumed
    other = {"objective": "size", "budget_s": 60.0}
    with pytest.raises(OutputExistsError, match="something else"), Output(tmp_path / "best", other, resume=True):
        pass


def test_a_document_that_nests_too_deeply_was_not_left_by_a_search(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "optimize.json").write_text("[" * 100_000)
    with pytest.raises(OutputExistsError, match="not left by a search"), Output(tmp_path / "best", WISH, resume=True):
        pass
