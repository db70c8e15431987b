"""Several versions of a model at once: which answer, to whom, and how they come and go."""

from __future__ import annotations

import asyncio
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest

from deploykit.errors import ArtifactError, DeploykitError, WorkerError
from deploykit.serving.engine import ServingEngine
from deploykit.serving.front import infer_counted
from deploykit.serving.loaded import Options, Source
from deploykit.serving.requests import DeadlineExceeded, InferRequest, NotReady, UnknownModel
from deploykit.serving.triton_api import Statistics
from deploykit.serving.versions import VersionPolicy
from deploykit.serving.workers import Answer
from deploykit.serving_models import serve

X = np.ones((1, 4), np.float32)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("latest:1", ("10",)), ("latest:2", ("9", "10")), ("latest:7", ("1", "2", "9", "10")),
        ("all", ("1", "2", "9", "10")), ("2", ("2",)), (" 10, 1,10", ("1", "10")), ("1,3", ("1",)),
    ],
)  # fmt: skip
def test_which_versions_are_chosen(text, chosen):
    assert VersionPolicy.parse(text).choose(("1", "2", "9", "10")) == chosen


def test_a_named_version_that_is_taken_away_goes_on():
    assert VersionPolicy.parse("1,3").choose(("3",), ("1", "2")) == ("1", "3")
    assert VersionPolicy.parse("all").choose(("3",), ("1", "2")) == ("3",)


@pytest.mark.parametrize("text", ["", "latest", "latest:0", "latest:-1", "every", "1,,2", "01", "1.5", "1,x"])
def test_what_says_nothing_is_refused(text):
    with pytest.raises(DeploykitError, match="expected latest:N, all, or 1,3"):
        VersionPolicy.parse(text)


class Instant:
    """A worker that multiplies by the number of its version, and is its own lane."""

    in_flight, spare, pid = 0, True, 0
    held = False

    def __init__(self, version, on_answer):
        self.factor, self.on_answer = int(version), on_answer
        self.lanes = [self]
        self.closed = False

    async def start(self):
        while self.held:
            await asyncio.sleep(0.001)
            if self.closed:
                raise WorkerError("ended with signal 9")
        return {"batched": False, "notes": [], "load_s": 0.0, "warm_s": 0.0}

    def send(self, tensors, done):
        def answer():
            done(Answer({"y": tensors[0].parts[0] * self.factor}, 0.0))
            self.on_answer()

        asyncio.get_running_loop().call_soon(answer)
        return 1

    def withdraw(self, offer):
        return False

    def kill(self):
        self.closed = True

    close = kill

    async def wait(self):
        return 0


@pytest.fixture
def versions(models, tmp_path):
    """`use(engine)` with a policy, beside a directory whose versions are made and taken away."""
    home, workers = tmp_path / "net", {}
    good = models.artifact(tmp_path / "good", models.scaled, 1.0).path

    def make(version):
        shutil.copytree(good, tmp_path / "copy")
        (tmp_path / "copy").rename(home / version)

    def hire(loaded, options, on_answer, on_end):
        workers[loaded.version] = Instant(loaded.version, on_answer)
        return workers[loaded.version]

    def run(policy, use, *there):
        home.mkdir()
        for version in there:
            make(version)

        async def all_of_it():
            options = Options(versions=VersionPolicy.parse(policy))
            engine = ServingEngine([Source.at(home)], options, hire=hire)
            await engine.start()
            try:
                await use(engine)
            finally:
                await engine.stop()

        asyncio.run(all_of_it())

    return SimpleNamespace(run=run, make=make, home=home, workers=workers)


async def factor(engine, version=None):
    found = await engine.infer(InferRequest("net", {"x": X}, version))
    assert (version or found.version) == found.version
    return float(found.outputs["y"][0, 0])


def states(engine):
    return {entry["version"]: entry["state"] for entry in engine.index()}


def test_a_request_goes_to_its_version_and_else_to_the_newest(versions):
    async def use(engine):
        assert [await factor(engine, v) for v in ("1", "2", "10", None, "")] == [1, 2, 10, 10, 10]
        assert engine.info("net").versions == engine.info("net", "2").versions == ("1", "2", "10")
        assert engine.model_ready("net", "2") and states(engine) == dict.fromkeys(("1", "2", "10"), "READY")
        for call in (engine.info, engine.model_ready):
            with pytest.raises(UnknownModel, match="no version '3' of 'net'; expected 1, 2, 10"):
                call("net", "3")
        text = engine.metrics.text()[0].decode()
        assert all(f'deploykit_queue_seconds_count{{model="net",version="{v}"}}' in text for v in ("1", "2", "10"))

    versions.run("all", use, "1", "2", "10")


def test_versions_come_and_go_one_by_one(versions):
    async def use(engine):
        watch = asyncio.ensure_future(engine.repository.watch(0.01))
        asked = [asyncio.ensure_future(factor(engine, "1")) for _ in range(20)]
        await asyncio.sleep(0)
        shutil.rmtree(versions.home / "1")
        versions.make("3")
        while engine.info("net").versions != ("2", "3"):
            await asyncio.sleep(0.005)
        assert await asyncio.gather(*asked) == [1.0] * 20
        assert [await factor(engine, v) for v in ("2", "3", None)] == [2, 3, 3]
        with pytest.raises(UnknownModel):
            await factor(engine, "1")
        while not versions.workers["1"].closed:
            await asyncio.sleep(0.005)
        assert not versions.workers["2"].closed
        watch.cancel()
        await engine.unload("net")
        await engine.drain()
        assert versions.workers["2"].closed and versions.workers["3"].closed
        await engine.load("net")
        assert [await factor(engine, v) for v in ("2", "3")] == [2, 3]

    versions.run("all", use, "1", "2")


def test_of_the_newest_the_older_one_stays_until_all_newer_ones_answer(versions):
    async def use(engine):
        assert engine.info("net").versions == ("2", "3")
        assert engine.index()[0]["reason"] == "not one of the newest 2 versions"
        versions.make("4")
        whole = (versions.home / "4" / "model.onnx").read_bytes()
        (versions.home / "4" / "model.onnx").write_bytes(b"half")
        with pytest.raises(ArtifactError):
            await engine.repository.refresh("net")
        assert engine.info("net").versions == ("2", "3") and engine.ready() and await factor(engine) == 3
        assert "sha256" in engine.index()[-1]["reason"]
        (versions.home / "4" / "model.onnx").write_bytes(whole)
        assert await engine.repository.refresh("net") and not await engine.repository.refresh("net")
        assert engine.info("net").versions == ("3", "4") and await factor(engine) == 4

    versions.run("latest:2", use, "1", "2", "3")


def test_a_version_that_was_replaced_is_swapped_alone(versions, models):
    async def use(engine):
        other = versions.workers["2"]
        shutil.rmtree(versions.home / "1")
        models.artifact(versions.home / "1", models.scaled, 5.0)
        old = versions.workers["1"]
        assert await engine.repository.refresh("net")
        await engine.drain()
        assert versions.workers["1"] is not old and old.closed and versions.workers["2"] is other and not other.closed
        assert engine.info("net").versions == ("1", "2")

    versions.run("1,2", use, "1", "2", "3")


def test_a_model_that_is_unloaded_while_somebody_looks_for_versions_stays_unloaded(versions):
    async def use(engine):
        lock = engine.repository._models["net"].lock
        await lock.acquire()
        unloading = asyncio.ensure_future(engine.unload("net"))
        await asyncio.sleep(0)
        looking = asyncio.ensure_future(engine.repository.rescan())
        await asyncio.sleep(0)
        lock.release()
        await asyncio.gather(unloading, looking)
        assert not engine.model_ready("net") and states(engine) == {"1": "UNAVAILABLE"}
        await engine.load("net")
        assert await factor(engine) == 1

    versions.run("all", use, "1")


def test_a_model_that_was_unloaded_holds_the_server_up_neither_while_it_loads_nor_where_it_cannot(
    versions, monkeypatch
):
    async def use(engine):
        await engine.unload("net")
        assert engine.ready()
        monkeypatch.setattr(Instant, "held", True)
        before = versions.workers["1"]
        loading = asyncio.ensure_future(engine.load("net"))
        while versions.workers["1"] is before:
            await asyncio.sleep(0.001)
        assert states(engine) == {"1": "LOADING"}
        assert engine.ready() and not engine.model_ready("net")
        with pytest.raises(NotReady, match="is being loaded"):
            await factor(engine)
        versions.workers["1"].kill()
        with pytest.raises(NotReady, match="cannot be loaded: ended with signal 9"):
            await loading
        assert engine.ready() and engine.index()[0]["reason"] == "ended with signal 9"
        with pytest.raises(NotReady, match="is not loaded"):
            await factor(engine)
        monkeypatch.setattr(Instant, "held", False)
        await engine.load("net")
        assert engine.ready() and await factor(engine) == 1

    versions.run("latest:1", use, "1")


def test_a_look_that_fails_is_not_the_last_one(versions, monkeypatch):
    async def use(engine):
        failed = []

        def broken(source):
            failed.append(source)
            raise RuntimeError("symlink loop")

        watch = asyncio.ensure_future(engine.repository.watch(0.001))
        with monkeypatch.context() as patched:
            patched.setattr(Source, "found", broken)
            while len(failed) < 3 and not watch.done():
                await asyncio.sleep(0.001)
        versions.make("2")
        while engine.info("net").versions != ("2",) and not watch.done():
            await asyncio.sleep(0.001)
        assert await factor(engine) == 2
        watch.cancel()

    versions.run("latest:1", use, "1")


def test_many_calls_to_look_are_two_looks(versions, monkeypatch):
    async def use(engine):
        seen = []
        refresh = engine.repository.refresh

        async def slow(name, **how):
            seen.append(sorted(p.name for p in versions.home.iterdir()))
            await asyncio.sleep(0.05)
            return await refresh(name, **how)

        monkeypatch.setattr(engine.repository, "refresh", slow)
        calls = [asyncio.ensure_future(engine.repository.rescan()) for _ in range(2)]
        await asyncio.sleep(0.01)
        versions.make("2")
        calls += [asyncio.ensure_future(engine.repository.rescan()) for _ in range(5)]
        await asyncio.gather(*calls)
        assert seen == [["1"], ["1", "2"]] and await factor(engine) == 2
        await engine.repository.rescan()
        assert len(seen) == 3

    versions.run("latest:1", use, "1")


def test_what_is_being_loaded_when_the_server_ends_is_given_up(versions, monkeypatch):
    async def use(engine):
        monkeypatch.setattr(Instant, "held", True)
        versions.make("2")
        loading = asyncio.ensure_future(engine.load("net"))
        while "2" not in versions.workers:
            await asyncio.sleep(0.001)
        await engine.drain()
        assert not loading.done() and await factor(engine) == 1
        engine.begin_to_stop()
        await engine.drain()
        for _ in range(2):
            with pytest.raises(NotReady, match="the server is ending"):
                await loading
            loading = asyncio.ensure_future(engine.load("net"))
        with pytest.raises(NotReady, match="the server is ending"):
            await loading
        assert await factor(engine) == 1

    versions.run("latest:1", use, "1")


def test_nothing_is_kept_of_versions_that_came_and_went(versions, monkeypatch):
    monkeypatch.setattr("deploykit.serving.metrics._MOST_GONE", 0)

    async def use(engine):
        for number in range(2, 5):
            shutil.rmtree(versions.home / str(number - 1))
            versions.make(str(number))
            await engine.repository.refresh("net")
            await engine.drain()
        versions.make("5")
        (versions.home / "5" / "model.onnx").write_bytes(b"half")
        with pytest.raises(ArtifactError):
            await engine.repository.refresh("net")
        monkeypatch.setattr(Instant, "start", Instant.kill)  # a worker that says nothing
        versions.make("6")
        with pytest.raises(TypeError):
            await engine.repository.refresh("net")
        text = engine.metrics.text()[0].decode()
        assert 'version="4"' in text and not any(f'version="{v}"' in text for v in (1, 2, 3, 5, 6))
        shutil.rmtree(versions.home / "5")
        shutil.rmtree(versions.home / "6")
        await engine.repository.refresh("net")
        assert not engine.repository._models["net"].refused and states(engine) == {"4": "READY"}

    versions.run("latest:1", use, "1")


def test_a_late_request_is_refused_and_counted_once(versions):
    async def use(engine):
        for late_s in (-1.0, 0.05):
            asked = InferRequest("net", {"x": X}, deadline=time.monotonic() + late_s)
            versions.workers["1"].send = lambda tensors, done: 1  # never answers
            with pytest.raises(DeadlineExceeded):
                await infer_counted(engine, asked, statistics)
        text = engine.metrics.text()[0].decode()
        assert 'deploykit_requests_total{model="net",outcome="deadline"} 2.0' in text
        assert text.count("deploykit_requests_total{") == 1
        assert statistics.shown(engine)[0]["inference_stats"]["fail"]["count"] == 2

    statistics = Statistics()
    versions.run("latest:1", use, "1")


def test_versions_that_are_named_have_to_be_there(versions):
    with pytest.raises(ArtifactError, match="holds no version 3; expected 1, 2"):
        versions.run("1,3", None, "1", "2")
    assert all(worker.closed for worker in versions.workers.values())


def test_versions_of_what_has_none_are_refused(models, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 1.0)
    with pytest.raises(DeploykitError, match="no model has versions of which 'all' could choose"):
        serve([tmp_path / "net"], versions="all")
