"""Real workers with small real models."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from deploykit.errors import ArtifactError, DeploykitError, ModelError, WorkerError
from deploykit.machine import allowed_cores
from deploykit.runtimes import RuntimeSettings
from deploykit.serving.arenas import Joined
from deploykit.serving.engine import ServingEngine
from deploykit.serving.loaded import Options, Source, load, state_now
from deploykit.serving.requests import Failed, InferRequest, InvalidRequest, RequestError, TooLarge, WorkerLost
from deploykit.serving.workers import DEPTH, Lane, Worker
from deploykit.specs import Signature

X = np.arange(8, dtype=np.float32).reshape(2, 4)


def serve(source: Path, use, **options) -> None:
    """Run `use(engine)` with an engine that serves one model."""

    async def run():
        engine = ServingEngine([Source.at(source)], Options(**{"threads": 1, **options}))
        await engine.start()
        try:
            await use(engine)
        finally:
            await engine.stop()

    asyncio.run(run())


def pids_of(engine: ServingEngine, name: str) -> tuple[int, ...]:
    return engine.repository.get(name).pids


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_artifact_is_served_and_its_workers_end_with_the_engine(models, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 3.0)
    seen = []

    async def use(engine):
        seen.extend(pids_of(engine, "net"))
        assert engine.ready() and engine.live() and engine.model_ready("net") and engine.names() == ("net",)
        info = engine.info("net")
        assert (info.versions, info.platform, info.inputs) == (("1",), "onnxruntime_onnx", models.rows.inputs)
        found = await engine.infer(InferRequest("net", {"x": X}, id="7"))
        np.testing.assert_array_equal(found.outputs["y"], 3 * X)
        assert (found.id, found.version) == ("7", "1") and found.compute_s > 0
        for array in (X[::-1], np.asfortranarray(X), np.broadcast_to(X[:1], (5, 4)), X.astype(">f4"), X[:0]):
            found = await engine.infer(InferRequest("net", {"x": array}))
            np.testing.assert_array_equal(found.outputs["y"], 3 * array.astype(np.float32))
        assert engine.index() == [{"name": "net", "version": "1", "state": "READY", "reason": ""}]

    serve(tmp_path / "net", use, instances=2)
    assert len(set(seen)) == 2 and not any(map(is_alive, seen))


def test_requests_are_joined_and_each_gets_its_rows(models, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 3.0)

    async def use(engine):
        inputs = [np.random.default_rng(n).normal(size=(n % 3 + 1, 4)).astype(np.float32) for n in range(40)]
        found = await asyncio.gather(*(engine.infer(InferRequest("net", {"x": x})) for x in inputs))
        for x, result in zip(inputs, found, strict=True):
            np.testing.assert_array_equal(result.outputs["y"], 3 * x)
        assert max(result.batch for result in found) > 3
        assert engine.info("net").max_batch == 8

    serve(tmp_path / "net", use, max_batch=8)


def test_a_model_whose_rows_see_each_other_is_not_batched(models, tmp_path):
    models.artifact(tmp_path / "net", models.centred)

    async def use(engine):
        assert engine.info("net").max_batch == 0
        found = await asyncio.gather(*(engine.infer(InferRequest("net", {"x": X + n})) for n in range(6)))
        for result in found:
            np.testing.assert_array_equal(result.outputs["y"], X - X.mean(0))

    serve(tmp_path / "net", use, max_batch=8)


def test_tuned_settings_decide_unless_something_is_asked_for(models, tmp_path):
    tuned = RuntimeSettings("ort:cpu", threads=1, sessions=2, concurrency=4, batch=4)
    models.artifact(tmp_path / "net", models.scaled, 3.0, settings=tuned)

    async def own(engine):
        assert len(pids_of(engine, "net")) == 2
        assert engine.info("net").max_batch == 4
        served = engine.repository.get("net")
        assert served.loaded.lanes == 2
        found = await asyncio.gather(*(engine.infer(InferRequest("net", {"x": X + n})) for n in range(20)))
        for n, result in enumerate(found):
            np.testing.assert_array_equal(result.outputs["y"], 3 * (X + n))

    async def asked(engine):
        assert len(pids_of(engine, "net")) == 1
        assert engine.info("net").max_batch == 2

    serve(tmp_path / "net", own, threads=None)
    serve(tmp_path / "net", asked, instances=1, max_batch=2)
    file = tmp_path / "tuned.json"
    RuntimeSettings("ort:cpu", threads=1, batch=3).save(file)

    async def other(engine):
        assert engine.info("net").max_batch == 3

    serve(tmp_path / "net", other, tuned=str(file))


def test_a_bare_file_is_parsed_by_the_worker_only(models, tmp_path):
    models.scaled(tmp_path / "bare.onnx", 2.0)

    async def use(engine):
        assert engine.info("bare").inputs == models.rows.inputs
        found = await engine.infer(InferRequest("bare", {"x": X}))
        np.testing.assert_array_equal(found.outputs["y"], 2 * X)

    serve(tmp_path / "bare.onnx", use)


def test_strings_go_in_and_come_out(models, tmp_path):
    models.write(
        tmp_path / "text.onnx", [helper.make_node("Identity", ["x"], ["y"])],
        [("x", models.STRING, ["n"])], [("y", models.STRING, ["n"])],
    )  # fmt: skip

    async def use(engine):
        texts = np.array(["a", "", "übung", b"bytes"], object)
        found = await engine.infer(InferRequest("text", {"x": texts}))
        assert found.outputs["y"].tolist() == ["a", "", "übung", "bytes"]

    serve(tmp_path / "text.onnx", use)


def test_what_only_the_model_can_refuse_costs_one_request(models, tmp_path):
    models.write(
        tmp_path / "pick.onnx", [helper.make_node("Gather", ["table", "i"], ["y"])],
        [("i", models.INT64, ["n"])], [("y", models.FLOAT, ["n"])], [("table", np.arange(5, dtype=np.float32))],
    )  # fmt: skip

    async def use(engine):
        asked = [engine.infer(InferRequest("pick", {"i": np.array([n])})) for n in (0, 1, 99, 3, 4)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(found[2], RequestError)
        assert [float(found[n].outputs["y"][0]) for n in (0, 1, 3, 4)] == [0, 1, 3, 4]

    serve(tmp_path / "pick.onnx", use, max_batch=8)


def test_tensors_larger_than_the_limit_are_refused_both_ways(models, tmp_path):
    models.write(
        tmp_path / "wide.onnx",
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        [("x", models.FLOAT, ["n", 1])], [("y", models.FLOAT, ["n", "m"])], [("shape", np.array([1, 1000]))],
    )  # fmt: skip

    async def use(engine):
        found = await engine.infer(InferRequest("wide", {"x": np.zeros((10, 1), np.float32)}))
        assert found.outputs["y"].shape == (10, 1000)
        for rows in (100, 100_000):  # the outputs are too large; the inputs are
            with pytest.raises(TooLarge):
                await engine.infer(InferRequest("wide", {"x": np.zeros((rows, 1), np.float32)}))
        await engine.infer(InferRequest("wide", {"x": np.zeros((10, 1), np.float32)}))

    serve(tmp_path / "wide.onnx", use, arena_bytes=2**17)


def turning_inputs(turns: int) -> dict[str, np.ndarray]:
    return {"x": np.zeros((64, 64), np.float32), "turns": np.array(turns)}


def test_kill_9_costs_those_in_flight_a_clean_error_and_nobody_else(models, tmp_path):
    models.turning(tmp_path / "net.onnx")

    async def use(engine):
        served = engine.repository.get("net")
        slow = [asyncio.ensure_future(engine.infer(InferRequest("net", turning_inputs(10**9)))) for _ in range(2)]
        while served.running < 2:
            await asyncio.sleep(0.001)
        killed, other = served.pids
        waits = [asyncio.ensure_future(engine.infer(InferRequest("net", turning_inputs(1)))) for _ in range(6)]
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="died"):
            await slow[0]
        while len(served.pids) < 2:
            await asyncio.sleep(0.01)
        assert other in served.pids and killed not in served.pids
        assert not slow[1].done()  # the other one computes on
        os.kill(other, signal.SIGKILL)
        lost = await asyncio.gather(*slow, return_exceptions=True)
        assert all(isinstance(error, WorkerLost) for error in lost)
        # What had been handed to a worker is lost with it, and whatever else waited is answered.
        found = await asyncio.gather(*waits, return_exceptions=True)
        good = [r for r in found if not isinstance(r, Exception)]
        assert len(good) >= 4 and all(isinstance(r, WorkerLost) for r in found if isinstance(r, Exception))
        await engine.infer(InferRequest("net", turning_inputs(1)))
        assert engine.ready()

    serve(tmp_path / "net.onnx", use, instances=2)


def test_nobody_waits_behind_a_slow_request_while_a_worker_is_free(models, tmp_path):
    models.turning(tmp_path / "net.onnx")

    async def use(engine):
        served = engine.repository.get("net")
        slow = asyncio.ensure_future(engine.infer(InferRequest("net", turning_inputs(10**9))))
        while not served.running:
            await asyncio.sleep(0.001)
        found = await asyncio.gather(*(engine.infer(InferRequest("net", turning_inputs(1))) for _ in range(9)))
        assert len(found) == 9 and not slow.done()
        slow.cancel()

    serve(tmp_path / "net.onnx", use, instances=2, timeout_s=30.0)


def test_what_was_taken_back_never_runs_and_what_comes_in_its_place_does(models, tmp_path):
    models.turning(tmp_path / "net.onnx")
    given = job(tmp_path / "net.onnx")

    async def run():
        worker = Worker(given, 1, 2**20, 60.0, nobody, nobody)
        await worker.start()
        (lane,) = worker.lanes
        answers: dict[int, object] = {}

        def send(number, turns, value):
            x = np.full((64, 64), value, np.float32)
            tensors = [Joined("x", "float32", (x,)), Joined("turns", "int64", (np.array(turns),))]
            return lane.send(tensors, lambda found: answers.update({number: np.array(found.outputs["y"])}))

        first, second = send(1, 20_000, 0), send(2, 1, 1)
        assert not lane.spare and lane.withdraw(second) and lane.spare and not lane.withdraw(second)
        third = send(3, 1, 2)  # in the slot of the second one, of which the worker is still to be told
        while lane.in_flight:
            await asyncio.sleep(0.01)
        assert answers.keys() == {1, 3}
        np.testing.assert_allclose(answers[3], np.tanh(np.full((64, 64), 2.0)), rtol=1e-5)
        assert not lane.withdraw(first) and not lane.withdraw(third)
        worker.close()
        await worker.wait()

    asyncio.run(run())


def test_a_request_for_which_there_is_no_memory_gives_its_slot_back(monkeypatch):
    def none(*args):
        raise OSError(12, "Cannot allocate memory")

    async def run():
        lane = Lane(2**20, nobody, nobody)
        lane.begin()
        with monkeypatch.context() as patched:
            patched.setattr("deploykit.serving.workers.write", none)
            for _ in range(DEPTH + 1):
                with pytest.raises(Failed, match=r"no memory for the request's tensors: OSError: .*Cannot allocate"):
                    lane.send([Joined("x", "float32", (X,))], nobody)
        assert lane.spare and not lane.in_flight
        for _ in range(DEPTH):
            lane.send([Joined("x", "float32", (X,))], nobody)
        assert lane.in_flight == DEPTH and not lane.spare
        lane.close()

    asyncio.run(run())


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_memory_of_the_largest_batch_is_there_before_the_first_request(models, tmp_path, lanes):
    models.artifact(tmp_path / "net", models.scaled, 3.0)
    rows = 2**14  # 256 KB each way

    async def run():
        given = {**job(tmp_path / "net"), "max_batch": rows}
        worker = Worker(given, lanes, 2**22, 60.0, nobody, nobody)
        await worker.start()

        def shared():
            return sum(os.fstat(fd).st_blocks * 512 for _, slots in told for slot in slots for fd in slot[:2])

        told = [lane.descriptors() for lane in worker.lanes]
        before = shared()
        assert before >= lanes * 2 * 2 * rows * 16
        answered = []
        for lane in worker.lanes:
            for _ in range(2):
                lane.send([Joined("x", "float32", (np.ones((rows, 4), np.float32),))], answered.append)
        while len(answered) < 2 * lanes:
            await asyncio.sleep(0.01)
        assert shared() == before
        worker.close()
        await worker.wait()

    asyncio.run(run())


def test_a_worker_that_hangs_is_replaced(models, tmp_path):
    models.turning(tmp_path / "net.onnx")

    async def use(engine):
        pids = pids_of(engine, "net")
        with pytest.raises(RequestError, match="time ran out"):
            await engine.infer(InferRequest("net", turning_inputs(10**9)))
        while pids_of(engine, "net") in (pids, ()):
            await asyncio.sleep(0.01)
        while True:
            try:
                await engine.infer(InferRequest("net", turning_inputs(1)))
                return
            except RequestError:
                await asyncio.sleep(0.05)

    serve(tmp_path / "net.onnx", use, timeout_s=0.5)


def test_a_model_that_takes_too_long_to_load_is_given_up(models, tmp_path):
    models.scaled(tmp_path / "net.onnx", 2.0)
    with pytest.raises(WorkerError, match=r"not loaded and warm within 0\.001 s"):
        serve(tmp_path / "net.onnx", None, load_s=0.001)


@pytest.mark.parametrize("how", ["late", "cancelled"])
def test_of_a_load_that_is_given_up_neither_a_process_nor_a_descriptor_is_left(models, tmp_path, how):
    models.scaled(tmp_path / "net.onnx", 2.0)
    given = job(tmp_path / "net.onnx")

    async def run():
        before = descriptors()
        worker = Worker(given, 1, 2**20, 0.001 if how == "late" else 60.0, nobody, nobody)
        loading = asyncio.ensure_future(worker.start())
        await asyncio.sleep(0)
        if how == "cancelled":
            loading.cancel()
        with pytest.raises(asyncio.CancelledError if how == "cancelled" else WorkerError):
            await loading
        assert worker.pid and not is_alive(worker.pid)  # which a process is that nobody has waited for
        assert descriptors() == before

    asyncio.run(run())


def test_what_lies_where_the_server_was_started_is_not_imported(models, tmp_path, monkeypatch):
    models.scaled(tmp_path / "net.onnx", 2.0)
    for name in ("numpy", "onnxruntime", "socket"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)

    async def use(engine):
        await engine.infer(InferRequest("net", {"x": X}))

    serve(tmp_path / "net.onnx", use)


def test_openvino_serves_too(models, tmp_path):
    models.scaled(tmp_path / "net.onnx", 2.0)

    async def use(engine):
        assert engine.info("net").platform == "openvino"
        found = await asyncio.gather(*(engine.infer(InferRequest("net", {"x": X + n})) for n in range(5)))
        for n, result in enumerate(found):
            np.testing.assert_allclose(result.outputs["y"], 2 * (X + n))

    serve(tmp_path / "net.onnx", use, device="openvino:cpu", max_batch=4)


def test_threads_that_are_asked_for_win_over_tuned_ones(models, tmp_path):
    tuned = RuntimeSettings("ort:cpu", threads=4, settings={"intra_op_num_threads": 4})
    models.artifact(tmp_path / "net", models.scaled, 3.0, settings=tuned)
    source = Source.at(tmp_path / "net")
    assert load(source, Options()).settings == tuned
    asked = load(source, Options(threads=1)).settings
    assert (asked.threads, asked.settings) == (1, {})
    assert load(source, Options(instances=2)).settings.threads == max(1, allowed_cores() // 2)
    assert load(source, Options(device="openvino:cpu")).settings.settings == {}


def test_streams_that_a_tuner_found_each_have_a_request(models, tmp_path):
    tuned = RuntimeSettings("openvino:cpu", threads=2, concurrency=2, settings={"NUM_STREAMS": 2})
    models.artifact(tmp_path / "net", models.scaled, 3.0, settings=tuned)

    async def use(engine):
        assert engine.repository.get("net").loaded.lanes == 2
        found = await asyncio.gather(*(engine.infer(InferRequest("net", {"x": X + n})) for n in range(40)))
        for n, result in enumerate(found):
            np.testing.assert_allclose(result.outputs["y"], 3 * (X + n))

    serve(tmp_path / "net", use, threads=None)


def test_a_model_of_complex_numbers_is_not_served(models, tmp_path):
    kind = TensorProto.COMPLEX64
    models.write(
        tmp_path / "net.onnx", [helper.make_node("Identity", ["x"], ["y"])], [("x", kind, ["n"])], [("y", kind, ["n"])]
    )
    with pytest.raises(DeploykitError, match="complex64"):
        serve(tmp_path / "net.onnx", None)


def test_a_changed_file_is_not_loaded(models, tmp_path):
    made = models.artifact(tmp_path / "net", models.scaled, 3.0)
    made.model_path.write_bytes(made.model_path.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="sha256"):
        serve(tmp_path / "net", None)


def test_a_model_that_is_not_its_manifest_is_not_served(models, tmp_path):
    wrong = Signature(models.specs(("x", "int64", ("batch", 4))), models.rows.outputs)
    models.artifact(tmp_path / "net", models.scaled, 3.0, signature=wrong)
    with pytest.raises(WorkerError, match="the model has x: float32"):
        serve(tmp_path / "net", None)


def test_golden_inputs_that_do_not_run_keep_a_model_from_being_ready(models, tmp_path):
    bad = [({"x": np.zeros((2, 5), np.float32)}, {"y": np.zeros((2, 5), np.float32)})]
    models.artifact(tmp_path / "net", models.scaled, 3.0, golden=bad)
    with pytest.raises(DeploykitError):
        serve(tmp_path / "net", None)


def test_a_corrupt_file_says_so(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no model")
    with pytest.raises(WorkerError, match=r"net\.onnx"):
        serve(tmp_path / "net.onnx", None)


def test_a_refused_input_never_reaches_a_worker(models, tmp_path):
    models.scaled(tmp_path / "net.onnx", 2.0)

    async def use(engine):
        with pytest.raises(InvalidRequest, match="'x' is float64; expected x: float32"):
            await engine.infer(InferRequest("net", {"x": X.astype(float)}))
        text = engine.metrics.text()[0].decode()
        assert 'deploykit_requests_total{model="net",outcome="invalid"} 1.0' in text
        assert 'deploykit_workers{model="net",version="1"} 1.0' in text

    serve(tmp_path / "net.onnx", use)


@pytest.mark.parametrize(
    ("name", "weights"), [("net.xml", "net.bin"), ("a.onnx", "a.onnx.data"), ("a.onnx", "a.onnx_data")]
)
def test_other_weights_make_another_model(tmp_path, name, weights):
    (tmp_path / name).write_bytes(b"graph")
    source, seen = Source.at(tmp_path / name), set()
    for data in (None, b"1", b"2"):
        if data:
            (tmp_path / weights).write_bytes(data)
        found = load(source, Options()).digest
        assert state_now(source).digest == found
        seen.add(found)
    assert len(seen) == 3


def test_what_can_be_served_and_what_it_is_called(models, tmp_path, monkeypatch):
    models.artifact(tmp_path / "net", models.scaled, 3.0)
    models.artifact(tmp_path / "many" / "2", models.scaled, 3.0)
    models.artifact(tmp_path / "many" / "10", models.scaled, 3.0)
    shutil.copytree(tmp_path / "net", tmp_path / "many" / "x")
    models.scaled(tmp_path / "bare.onnx", 2.0)
    many = Source.at(tmp_path / "many")
    assert (many.name, many.versioned, many.at_version()[0]) == ("many", True, "10")
    assert Source.at(tmp_path / "net").at_version() == ("1", (tmp_path / "net").resolve())
    assert Source.at(tmp_path / "bare.onnx").name == "bare"
    assert Source.at(tmp_path / "net", "other").name == "other"
    monkeypatch.chdir(tmp_path / "net")
    assert Source.at(".").name == "net"
    (tmp_path / "text.txt").write_text("no")
    (tmp_path / "empty").mkdir()
    for path, error, message in (
        ("text.txt", ModelError, "cannot be served"), ("empty", ArtifactError, "is no artifact"),
        ("nothing", ArtifactError, "does not exist"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            Source.at(tmp_path / path)
    with pytest.raises(ModelError, match=r"cannot be called 'a/b'.*--name"):
        Source.at(tmp_path / "net", "a/b")


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def job(path: Path) -> dict:
    source = Source.at(path)
    return {**load(source, Options(threads=1)).job(), "max_batch": 1}


def nobody(*_: object) -> None:
    """Of whom nothing is wanted."""


def test_a_worker_that_dies_as_it_becomes_ready_is_not_taken_for_one_that_answers(models, tmp_path, monkeypatch):
    models.scaled(tmp_path / "net.onnx", 2.0)
    told = Lane._told

    def told_and_dead(lane, found):
        told(lane, found)
        lane.close()
        lane._on_end()

    monkeypatch.setattr(Lane, "_told", told_and_dead)
    with pytest.raises(WorkerError, match=r"net\.onnx ended with "):
        serve(tmp_path / "net.onnx", None)


def test_what_cannot_be_started_leaves_no_descriptors(models, tmp_path, monkeypatch):
    models.scaled(tmp_path / "net.onnx", 2.0)
    found = job(tmp_path / "net.onnx")

    def none(*args, **kwargs):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    async def run():
        before = descriptors()
        monkeypatch.setattr(subprocess, "Popen", none)
        with pytest.raises(WorkerError, match="no process can be started"):
            await Worker(found, 2, 2**20, 60.0, nobody, nobody).start()
        monkeypatch.setattr(os, "memfd_create", none)
        with pytest.raises(WorkerError, match="no memory can be shared"):
            Worker(found, 2, 2**20, 60.0, nobody, nobody)
        assert descriptors() == before

    asyncio.run(run())


def test_a_worker_that_cannot_be_understood_is_replaced(models, tmp_path, monkeypatch):
    models.turning(tmp_path / "net.onnx")

    async def use(engine):
        served = engine.repository.get("net")
        (worker,) = served._workers
        waits = asyncio.ensure_future(engine.infer(InferRequest("net", turning_inputs(10**9))))
        while not served.running:
            await asyncio.sleep(0.001)
        worker.lanes[0]._take(b"no JSON\n")
        with pytest.raises(WorkerLost):
            await waits
        while not served.ready:
            await asyncio.sleep(0.01)
        await engine.infer(InferRequest("net", turning_inputs(1)))
        assert not is_alive(worker.pid)

    serve(tmp_path / "net.onnx", use)
