"""Jobs on a Ray cluster of two nodes, both on this machine: one with slots of ours, one that has CPUs only."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import deploykit
from deploykit.artifact import sha256_of
from deploykit.data import Dataset
from deploykit.errors import DataError, JobTimeoutError, WorkerError
from deploykit.optimizers import StaticConfig
from deploykit.search import ray_executor, timing
from deploykit.search.executor import LocalExecutor
from deploykit.search.jobs import Job
from deploykit.search.machines import machine_of
from deploykit.search.ray_executor import RESOURCE, RayExecutor
from deploykit.search.shards import STATE, cut, merge_job, shard_job

MARK = "DEPLOYKIT_TESTS_CLUSTER"


@pytest.fixture(scope="module")
def cluster(deeds_can_be_found):
    """Its processes find what this one finds."""
    before = os.environ.get("PYTHONPATH")
    home = str(Path(ray_executor.deploykit.__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [home, before]))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ[MARK] = str(os.getpid())
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "resources": {RESOURCE: 2}, "include_dashboard": False},
    )
    found.add_node(num_cpus=4)
    yield found
    found.shutdown()
    os.environ["PYTHONPATH"] = before or ""


@pytest.fixture(scope="module")
def told(tools):
    return tools.Told()


@pytest.fixture(scope="module")
def executor(cluster, told):
    with RayExecutor(cluster.address, progress=told) as found:
        yield found


@pytest.fixture(scope="module")
def far(executor):
    """The node whose files are not this process's."""
    (found,) = [n.name for n in executor.machines() if n.name != executor._home]
    return found


def job(name, /, **params):
    names = {"exclusive", "timeout_s", "retries", "inputs", "label", "node"} & params.keys()
    options = {name: params.pop(name) for name in names}
    return Job(f"deeds:{name}", params, **options)


def test_the_nodes_say_what_they_are(executor, told):
    nodes = executor.machines()
    assert [n.slots for n in nodes] == [2, 2] and executor.slots == 4
    assert [n.machine for n in nodes] == [machine_of()] * 2 and len({n.kind for n in nodes}) == 1
    assert len({n.name for n in nodes}) == 2
    assert len(told.notes) == 1 and "a measurement takes all of its 4 CPUs instead" in told.notes[0]


def test_what_is_made_far_away_is_what_is_made_here(executor, far, tmp_path, folders, told):
    np.save(tmp_path / "values.npy", np.arange(1000.0))
    inputs = {"values": tmp_path / "values.npy"}
    with LocalExecutor(1) as local:
        here = local.submit(job("double", inputs=inputs), folders()).result()
    for node in (n.name for n in executor.machines()):
        told.steps.clear()
        done = executor.submit(job("double", inputs=inputs, node=node, label="twice"), folders()).result()
        assert {**done.value, "pid": 0} == {**here.value, "pid": 0} and done.value["pid"] != here.value["pid"]
        assert (done.notes, done.machine) == (here.notes, here.machine)
        files = [
            sorted(p.relative_to(d.folder).as_posix() for d in [d] for p in d.folder.rglob("*")) for d in (here, done)
        ]
        assert files[0] == files[1] == ["made", "made/empty", "made/twice.npy"]
        twice = "made/twice.npy"
        assert (done.folder / twice).read_bytes() == (here.folder / twice).read_bytes()
        assert told.steps == ["twice: double"] and told.notes[-1] == "twice: 1000 values"


def test_directories_travel_and_equal_files_once(executor, far, tmp_path, folders, monkeypatch):
    for name in ("one", "two"):
        root = tmp_path / name
        (root / "inner" / "empty").mkdir(parents=True)
        (root / "inner" / "weights").write_text("the same" * 1000)
        (root / "nothing").touch()
        (root / "config").write_text(name)
    put = []
    monkeypatch.setattr(executor._store, "_put", lambda data: put.append(data.size) or executor._ray.put(data))
    for name in ("one", "two", "one"):
        done = executor.submit(job("tree", inputs={"model": tmp_path / name}, node=far), folders()).result()
        assert done.value == {
            "name": name, "files": {"inner/weights": "the same" * 1000, "nothing": "", "config": name}
        }  # fmt: skip
    assert sorted(put) == [0, 3, 3, 8000]


def overlaps(one, other):
    return one["begin"] < other["end"] and other["begin"] < one["end"]


@pytest.mark.parametrize("where", ["with our slots", "with CPUs only"])
def test_a_measurement_has_its_node_for_itself(executor, far, folders, where):
    node = far if where == "with CPUs only" else executor._home
    futures = [
        executor.submit(job("interval", seconds=0.15, node=node, exclusive=alone), folders())
        for alone in (False, False, False, True, False, True, False)
    ]
    found = [f.result().value for f in futures]
    for i in (3, 5):
        assert not any(overlaps(found[i], other) for j, other in enumerate(found) if j != i)


def test_a_measurement_of_another_search_waits_too(cluster, executor, folders):
    """Ray itself keeps them apart: our queue does not know theirs."""
    ray, share = executor._ray, executor._shares[executor._home]
    told = {"deed": "deeds:interval", "params": {"seconds": 0.3}, "inputs": {}}
    found = [
        ray.remote(ray_executor.ray_node.perform)
        .options(num_returns="streaming", **executor._on(executor._home), **share.options(alone))
        .remote({**told, "folder": str(folders())}, None, {}, "x")
        for alone in (True, True)
    ]  # fmt: skip
    mine = executor.submit(job("interval", seconds=0.3, node=executor._home, exclusive=True), folders()).result().value
    theirs = [[ray.get(ref) for ref in stream][-1]["value"] for stream in found]
    assert not any(overlaps(mine, other) for other in theirs) and not overlaps(*theirs)


@pytest.mark.parametrize("who", ["the job", "Ray's process"])
def test_what_is_killed_in_the_middle_costs_a_retry(executor, far, folders, tmp_path, told, who):
    seen = tmp_path / "seen"
    dying = job("die", seen=str(seen), deaths=1, above=0 if who == "the job" else 2, node=far, label="the victim")
    done = executor.submit(dying, folders()).result()
    assert done.value == {"left over": []} and not any(done.folder.iterdir())
    assert seen.read_text() == "xx"
    assert "the victim is done again" in told.notes[-1]


def test_but_not_for_ever(executor, folders, tmp_path):
    future = executor.submit(job("die", seen=str(tmp_path / "seen"), deaths=9, above=2), folders())
    with pytest.raises(WorkerError, match=r"Ray's process ended .*, 2 times"):
        future.result()
    assert (tmp_path / "seen").read_text() == "xx"


def test_a_late_job_is_ended_with_all_that_it_started(executor, far, tmp_path, folders, tools):
    pids = tmp_path / "pids"
    with pytest.raises(JobTimeoutError, match="took longer than 3 s"):
        executor.submit(job("hang", pids=str(pids), timeout_s=3.0, node=far), folders()).result()
    tools.wait_for(lambda: not any(tools.running(pid) for pid in pids.read_text().split()))


def test_errors_and_bugs_arrive(executor, folders):
    with pytest.raises(DataError) as caught:
        executor.submit(job("refuse", kind="data"), folders()).result()
    assert (caught.value.what, caught.value.expected, caught.value.hint) == ("no such thing", "a thing", "give one")
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*blunder"):
        executor.submit(job("blunder"), folders()).result()
    with pytest.raises(WorkerError, match="no machine is called 'elsewhere'"):
        executor.submit(job("blunder", node="elsewhere"), folders())


def test_nodes_with_another_version_are_refused(cluster, executor, monkeypatch):
    monkeypatch.setattr(ray_executor.deploykit, "__version__", "9.9")
    other = RayExecutor(cluster.address)
    with pytest.raises(WorkerError, match=r"has DeployKit 0\.1\.0; expected version 9\.9, as here"):
        other.machines()


def test_calibration_in_parts_gives_the_bits_of_one_run(executor, far, digits_net, tmp_path, folders):
    """Parts far away, parts here, a sum in another order: as if it were one job of a process of this machine."""
    config = StaticConfig(batch_size=16)
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(digits_net, folder / "net.onnx")
    data = Dataset.open(digits_net.parent / "calib.npz")
    (whole,) = cut(data, digits_net, config, tmp_path, 1)
    with LocalExecutor(1) as local:
        wanted = local.submit(shard_job(digits_net, whole, config, "ort:cpu"), folders()).result()
    (tmp_path / "parts").mkdir()
    shards = cut(data, digits_net, config, tmp_path / "parts", 4)
    jobs = [shard_job(folder, shard, config, "ort:cpu", "net.onnx") for shard in shards]
    nodes = [far, executor._home, None, far]
    futures = [executor.submit(replace(j, node=n), folders()) for j, n in zip(jobs, nodes, strict=True)]
    states = [f.result().folder / STATE for f in futures]
    total = executor.submit(replace(merge_job([states[i] for i in (2, 0, 3, 1)]), node=far), folders()).result()
    assert total.value == wanted.value == {"samples": 400, "tensors": total.value["tensors"]}
    assert (total.folder / STATE).read_bytes() == (wanted.folder / STATE).read_bytes()


CLIENT = """
import sys
from pathlib import Path
import numpy as np
from deploykit.search.jobs import Job
from deploykit.search.ray_executor import RayExecutor
address, root = sys.argv[1], Path(sys.argv[2])
for name in ("first", "second"):
    (root / name).mkdir()
np.save(root / "values.npy", np.arange(1000.0))
with RayExecutor(address) as executor:
    done = executor.submit(Job("deeds:double", {}, {"values": root / "values.npy"}), root / "first").result()
    assert done.value["sum"] == 999000 and done.notes == ("1000 values",), done
    executor.submit(Job("deeds:die", {"seen": str(root / "seen"), "deaths": 1, "above": 2}), root / "second").result()
print(np.load(root / "first" / "made" / "twice.npy").sum())
"""


def working():
    """Processes that do jobs for us on the nodes of this module's cluster."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command, mark = (process / "cmdline").read_bytes(), f"{MARK}={os.getpid()}".encode()
            if b"deploykit.search.guard" in command and mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def test_a_search_finds_the_winner_of_this_machine_though_a_worker_is_killed(
    cluster, digits_net, tmp_path, tools, brief, monkeypatch
):
    """The same file, from ranges that both nodes found parts of; by size, because no two timings are the same."""
    killed = []

    def kill(event):
        if event.kind == "phase" and event.text == "make":

            def strike():
                killed.append(max(tools.wait_for(working)))
                os.kill(killed[0], signal.SIGKILL)

            threading.Thread(target=strike).start()

    asked = {
        "data": digits_net.with_name("calib.npz"), "min_agreement": 0.9, "objective": "size",
        "schemes": ("static", "fp16"), "devices": ("ort:cpu",), "tune": False, "budget_s": 60.0, "cache": False,
    }  # fmt: skip
    told = tools.Told()
    far = deploykit.optimize(
        digits_net, tmp_path / "far", executor=RayExecutor(cluster.address, progress=told), shards=4,
        on_event=kill, **asked,
    )  # fmt: skip
    assert killed and any("is done again" in note for note in told.notes)
    monkeypatch.setattr(timing, "plan", lambda *_: (0, 0, 0.0))  # it was measured there
    here = deploykit.optimize(digits_net, tmp_path / "here", **{**asked, "budget_s": 30.0})
    assert far.document["winner"] == here.document["winner"] == "front/static"
    assert sha256_of(far.artifact.model_path) == sha256_of(here.artifact.model_path)
    assert far.artifact.manifest.lineage[-2].params["samples"] == here.artifact.manifest.lineage[-2].params["samples"]


def test_over_the_network(cluster, executor, tmp_path, tools):
    """`ray://`: nothing of this process is a node; the server is what stands behind that address."""
    host = cluster.address.rpartition(":")[0]
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray.util.client.server", f"--address={cluster.address}", f"--host={host}"]
    server = subprocess.Popen([*command, f"--port={port}", "--mode=specific-server"], stderr=subprocess.DEVNULL)
    try:
        tools.wait_for(lambda: server.poll() is not None or answers(host, port))
        made = subprocess.run(
            [sys.executable, "-c", CLIENT, f"ray://{host}:{port}", str(tmp_path)],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    finally:
        server.kill()
        server.wait()
    assert (made.returncode, made.stdout) == (0, "999000.0\n"), made.stderr
    assert (tmp_path / "seen").read_text() == "xx"


def answers(host, port):
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


NOBODY = """
import sys
from deploykit.errors import WorkerError
from deploykit.search.ray_executor import RayExecutor
for address in sys.argv[1:]:
    try:
        RayExecutor(address).machines()
    except WorkerError as exc:
        print(exc)
"""


def test_no_cluster_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    forms = address, f"ray://{address}", "nowhere"
    made = subprocess.run([sys.executable, "-c", NOBODY, *forms], capture_output=True, text=True, timeout=60)
    lines = made.stdout.splitlines()
    assert len(lines) == 3, made.stderr
    assert all(line.startswith(f"no Ray cluster at {form} (") for line, form in zip(lines, forms, strict=True))


SCRIPT = """
import sys
from pathlib import Path
from deploykit.search.jobs import Job
from deploykit.search.ray_executor import RayExecutor
root = Path(sys.argv[1])
(root / "out").mkdir()
with RayExecutor(workers=2) as executor:
    assert executor.slots == 2, executor.machines()
    future = executor.submit(Job("deeds:hang", {"pids": str(root / "pids")}), root / "out")
    while not (root / "pids").exists():
        pass
    from ray._private.worker import global_worker
    (root / "session").write_text(global_worker.node.get_session_dir_path())
print("left")
"""


def test_a_cluster_of_its_own_ends_with_it(tmp_path, tools):
    env = {**os.environ, "HOME": str(tmp_path)}  # where Ray keeps the token that its processes know each other by
    made = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=120, env=env
    )
    assert (made.returncode, made.stdout) == (0, "left\n"), made.stderr
    tools.wait_for(lambda: not any(tools.running(pid) for pid in (tmp_path / "pids").read_text().split()))
    session = (tmp_path / "session").read_text()
    assert "session_" in session
    # Ray's own agents may outlive it by minutes; they end by themselves.
    tools.wait_for(lambda: not any(session.encode() in line and b"agent" not in line for line in command_lines()))


def command_lines():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes()
        except OSError:
            continue
