"""Jobs in processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import CancelledError

import numpy as np
import pytest

from deploykit.errors import DataError, JobTimeoutError, SearchError, WorkerError
from deploykit.search.executor import LocalExecutor
from deploykit.search.jobs import Job
from deploykit.search.machines import kind_of, machine_of


def job(name, /, **params):
    options = {
        k: params.pop(k)
        for k in ("exclusive", "timeout_s", "stall_s", "retries", "inputs", "label", "node")
        if k in params
    }
    return Job(f"deeds:{name}", params, **options)


@pytest.fixture
def executor():
    with LocalExecutor(2) as found:
        yield found


def test_a_job_gives_its_value_its_files_and_its_machine(tmp_path, folders, tools):
    np.save(tmp_path / "values.npy", np.arange(4.0))
    told = tools.Told()
    with LocalExecutor(1, told) as executor:
        doing = job("double", inputs={"values": tmp_path / "values.npy"}, label="twice", a=[1, None])
        done = executor.submit(doing, folders()).result()
        assert executor.slots == 1 and [n.machine for n in executor.machines()] == [done.machine]
    assert done.value["sum"] == 12 and done.value["params"] == {"a": [1, None]} and done.value["pid"] != os.getpid()
    np.testing.assert_array_equal(np.load(done.folder / "made" / "twice.npy"), np.arange(4.0) * 2)
    assert done.notes == ("4 values",) and told.notes == ["twice: 4 values"]
    assert told.steps == ["twice: double"] and told.advances == [(1, 2, "halves")]
    assert done.machine == machine_of() and len(kind_of(done.machine)) == 12
    assert not done.cached and done.seconds > 0


def test_two_run_side_by_side(executor, tmp_path, folders):
    first = executor.submit(job("meet", place=str(tmp_path), name="a", other="b"), folders())
    second = executor.submit(job("meet", place=str(tmp_path), name="b", other="a"), folders())
    assert first.result(60).value["pid"] != second.result(60).value["pid"]


def test_a_process_stays_and_a_job_leaves_nothing_to_the_next(folders):
    with LocalExecutor(1) as executor:
        first, second = (executor.submit(job("litter"), folders()).result().value for _ in range(2))
    assert first == second and first["seen"] is None and first["home"]


def overlaps(one, other):
    return one["begin"] < other["end"] and other["begin"] < one["end"]


def test_a_measurement_has_the_machine_for_itself(executor, folders):
    """And comes to its turn, however many others were there before, or come after it."""
    before = [executor.submit(job("interval", seconds=0.2), folders()) for _ in range(3)]
    alone = [executor.submit(job("interval", seconds=0.1, exclusive=True), folders()) for _ in range(2)]
    after = [executor.submit(job("interval", seconds=0.1), folders()) for _ in range(4)]
    ordinary = [f.result().value for f in before + after]
    for one in (f.result().value for f in alone):
        assert not any(overlaps(one, other) for other in ordinary)
        assert all(one["end"] <= f.result().value["begin"] for f in after)
    assert not overlaps(*(f.result().value for f in alone))


def test_a_late_job_is_ended_with_all_that_it_started(executor, tmp_path, folders, tools):
    pids = tmp_path / "pids"
    future = executor.submit(job("hang", pids=str(pids), timeout_s=3.0, label="the long one"), folders())
    with pytest.raises(JobTimeoutError, match="the long one took longer than 3 s"):
        future.result()
    found = pids.read_text().split()
    assert len(found) == 3
    tools.wait_for(lambda: not any(tools.running(pid) for pid in found))
    # The executor goes on.
    assert executor.submit(job("interval", seconds=0), folders()).result().value["pid"]


def test_a_job_that_says_nothing_more_is_ended(executor, folders):
    with pytest.raises(JobTimeoutError, match="the quiet one said nothing for 1 s and was ended"):
        quiet = job("stand_still", pause=0.8, stall_s=1.0, timeout_s=300.0, label="the quiet one")
        executor.submit(quiet, folders()).result()


@pytest.mark.parametrize("above", [0, 1], ids=["the worker", "its guard"])
def test_a_job_whose_process_is_killed_is_done_again(folders, tmp_path, tools, above):
    told = tools.Told()
    with LocalExecutor(1, told) as executor:
        done = executor.submit(job("die", seen=str(tmp_path / "seen"), deaths=1, above=above), folders()).result()
    assert done.value == {"left over": []} and not any(done.folder.iterdir())
    assert (tmp_path / "seen").read_text() == "xx"
    assert len(told.notes) == 1 and "done again" in told.notes[0] and "signal 9" in told.notes[0]


@pytest.mark.parametrize("retries", [0, 2])
def test_it_is_not_done_for_ever(executor, folders, tmp_path, retries):
    future = executor.submit(job("die", seen=str(tmp_path / "seen"), deaths=9, retries=retries), folders())
    with pytest.raises(WorkerError, match=r"signal 9 \(about to be killed\)") as caught:
        future.result()
    assert not isinstance(caught.value, JobTimeoutError)
    assert len((tmp_path / "seen").read_text()) == 1 + retries


@pytest.mark.parametrize(("kind", "error"), [("data", DataError), ("search", SearchError)])
def test_errors_of_users_arrive_as_they_were_raised(executor, folders, kind, error):
    with pytest.raises(error) as caught:
        executor.submit(job("refuse", kind=kind), folders()).result()
    assert type(caught.value) is error
    assert (caught.value.what, caught.value.expected, caught.value.hint) == ("no such thing", "a thing", "give one")


@pytest.mark.parametrize("name", ["blunder", "there is none"])
def test_bugs_arrive_with_their_traceback(executor, folders, name):
    with pytest.raises(RuntimeError, match="Traceback") as caught:
        executor.submit(job(name), folders()).result()
    assert name in str(caught.value)


def test_jobs_for_other_machines_are_refused(executor, folders):
    with pytest.raises(WorkerError, match="no machine is called 'elsewhere'; expected one of local"):
        executor.submit(job("interval", seconds=0, node="elsewhere"), folders())
    assert executor.submit(job("interval", seconds=0, node="local"), folders()).result().value


def test_a_worker_that_dies_leaves_no_process(folders, tmp_path, tools):
    pids = tmp_path / "pids"
    with LocalExecutor(1) as executor:
        future = executor.submit(job("hang", pids=str(pids), retries=0), folders())
        tools.wait_for(pids.exists)
        found = pids.read_text().split()
        os.kill(int(found[0]), signal.SIGKILL)
        with pytest.raises(WorkerError, match="signal 9"):
            future.result()
        tools.wait_for(lambda: not any(tools.running(pid) for pid in found))


def test_on_the_way_out_everything_ends(tmp_path, folders, tools):
    pids = tmp_path / "pids"
    with pytest.raises(KeyboardInterrupt), LocalExecutor(1) as executor:
        running = executor.submit(job("hang", pids=str(pids)), folders())
        waiting = executor.submit(job("interval", seconds=0), folders())
        tools.wait_for(pids.exists)
        raise KeyboardInterrupt
    tools.wait_for(lambda: not any(tools.running(pid) for pid in pids.read_text().split()))
    with pytest.raises(WorkerError, match="closed"):
        running.result(0)
    with pytest.raises(CancelledError):
        waiting.result(0)
    with pytest.raises(WorkerError, match="closed"):
        executor.submit(job("interval", seconds=0), folders())


SCRIPT = """
import sys
from pathlib import Path
from deploykit.search.executor import LocalExecutor
from deploykit.search.jobs import Job
root = Path(sys.argv[1])
(root / "out").mkdir()
with LocalExecutor(2) as executor:
    executor.submit(Job("deeds:hang", {"pids": str(root / "pids")}), root / "out").result()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_parent_that_ends_leaves_no_process(tmp_path, tools, how):
    pids = tmp_path / "pids"
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], stderr=subprocess.PIPE)
    try:
        tools.wait_for(lambda: pids.exists() or parent.poll() is not None)
        parent.send_signal(how)
        _, text = parent.communicate(timeout=60)
    finally:
        parent.kill()
    assert parent.returncode == -how, text
    tools.wait_for(lambda: not any(tools.running(pid) for pid in pids.read_text().split()))
