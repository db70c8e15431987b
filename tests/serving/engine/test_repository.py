"""Models that come, change and go while they are asked."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal

import numpy as np
import pytest

from deploykit.errors import ArtifactError, DeploykitError, WorkerError
from deploykit.serving.engine import ServingEngine
from deploykit.serving.loaded import Options, Source
from deploykit.serving.requests import InferRequest, NotReady, RequestError, UnknownModel

X = np.arange(8, dtype=np.float32).reshape(2, 4)


async def factor(engine, name: str = "net", version: str | None = None) -> float:
    found = await engine.infer(InferRequest(name, {"x": X}, version))
    return float(found.outputs["y"][0, 1])


class Load:
    """Requests without a pause, from several clients, each of which has to be answered."""

    def __init__(self, engine, clients: int = 4) -> None:
        self.answers: list[tuple[str, float]] = []
        self.stopped = False
        self.tasks = [asyncio.ensure_future(self.client(engine)) for _ in range(clients)]

    async def client(self, engine) -> None:
        while not self.stopped:
            found = await engine.infer(InferRequest("net", {"x": X}))
            self.answers.append((found.version, float(found.outputs["y"][0, 1])))

    async def some(self, count: int = 50) -> None:
        wanted = len(self.answers) + count
        while len(self.answers) < wanted:
            for task in self.tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(0.005)

    async def end(self) -> None:
        self.stopped = True
        await asyncio.gather(*self.tasks)


def serve(*sources: Source, use, **options) -> None:
    async def run():
        engine = ServingEngine(sources, Options(threads=1, **options))
        await engine.start()
        try:
            await use(engine)
        finally:
            await engine.stop()

    asyncio.run(run())


def test_a_new_version_takes_over_under_load_without_a_failed_request(models, tmp_path):
    models.artifact(tmp_path / "net" / "1", models.scaled, 1.0)

    async def use(engine):
        load = Load(engine)
        watch = asyncio.ensure_future(engine.repository.watch(0.02))
        await load.some()
        old = engine.repository.get("net")
        pids = old.pids
        await asyncio.to_thread(models.artifact, tmp_path / "net" / "2", models.scaled, 2.0)
        while engine.info("net").versions != ("2",):
            await load.some(1)
        await load.some()
        await load.end()
        watch.cancel()
        await engine.drain()
        assert set(load.answers) == {("1", 1.0), ("2", 2.0)}
        first = load.answers.index(("2", 2.0))
        assert ("1", 1.0) not in load.answers[first + 8 :]  # no more than what was in flight
        assert old.running == old.waiting == 0 and old.pids == () and len(pids) == 1
        with pytest.raises(UnknownModel, match="no version '1'"):
            await factor(engine, version="1")
        assert await factor(engine, version="2") == 2.0

    serve(Source.at(tmp_path / "net"), use=use)


def test_a_version_that_does_not_load_leaves_the_old_one_and_is_tried_again_when_it_changes(models, tmp_path):
    models.artifact(tmp_path / "net" / "1", models.scaled, 1.0)

    async def use(engine):
        good = tmp_path / "good"
        models.artifact(good, models.scaled, 2.0)
        bad = tmp_path / "net" / "2"
        shutil.copytree(good, bad)
        (bad / "model.onnx").write_bytes(b"half")
        with pytest.raises(ArtifactError):
            await engine.repository.refresh("net")
        assert engine.ready() and await factor(engine) == 1.0
        states = {entry["version"]: (entry["state"], entry["reason"]) for entry in engine.index()}
        assert states["1"] == ("READY", "")
        assert states["2"][0] == "UNAVAILABLE" and "sha256" in states["2"][1]
        assert not await engine.repository.refresh("net", again=False)
        await engine.repository.rescan()  # logs, and goes on
        assert await factor(engine) == 1.0
        shutil.copy(good / "model.onnx", bad / "model.onnx")
        assert await engine.repository.refresh("net")
        assert await factor(engine) == 2.0

    serve(Source.at(tmp_path / "net"), use=use)


def test_a_version_that_is_still_being_copied_is_loaded_once_it_is_whole(models, tmp_path):
    models.artifact(tmp_path / "net" / "1", models.scaled, 1.0)
    good = models.artifact(tmp_path / "good", models.scaled, 2.0).path

    async def use(engine):
        watch = asyncio.ensure_future(engine.repository.watch(0.02))
        there = tmp_path / "net" / "2"
        there.mkdir()
        shutil.copy(good / "manifest.json", there)
        while not any("lacks" in entry["reason"] for entry in engine.index()):
            await asyncio.sleep(0.01)
        (there / "model.onnx").write_bytes((good / "model.onnx").read_bytes()[:50])
        await asyncio.sleep(0.1)
        assert await factor(engine) == 1.0
        for name in ("model.onnx", "golden.npz"):
            shutil.copy(good / name, there)
        while engine.info("net").versions != ("2",):
            await asyncio.sleep(0.01)
        assert await factor(engine) == 2.0
        watch.cancel()

    serve(Source.at(tmp_path / "net"), use=use)


def test_a_newest_version_that_is_taken_away_gives_its_place_back(models, tmp_path):
    models.artifact(tmp_path / "net" / "1", models.scaled, 1.0)
    models.artifact(tmp_path / "net" / "2", models.scaled, 2.0)

    async def use(engine):
        watch = asyncio.ensure_future(engine.repository.watch(0.02))
        assert await factor(engine) == 2.0
        (tmp_path / "net" / "2").rename(tmp_path / "away")
        while engine.info("net").versions != ("1",):
            await asyncio.sleep(0.01)
        assert await factor(engine) == 1.0
        (tmp_path / "net" / "1").rename(tmp_path / "away1")
        await asyncio.sleep(0.1)
        assert await factor(engine) == 1.0
        watch.cancel()

    serve(Source.at(tmp_path / "net"), use=use)


def test_a_version_that_kills_its_worker_leaves_the_old_one(models, tmp_path):
    models.artifact(tmp_path / "net" / "1", models.scaled, 1.0)

    async def use(engine):
        wrong = [({"x": np.zeros((1, 9), np.float32)}, {"y": np.zeros((1, 9), np.float32)})]
        models.artifact(tmp_path / "net" / "2", models.scaled, 2.0, golden=wrong)
        with pytest.raises(WorkerError):
            await engine.repository.refresh("net")
        assert engine.ready() and await factor(engine) == 1.0

    serve(Source.at(tmp_path / "net"), use=use)


def test_a_directory_that_was_replaced_is_loaded_on_a_rescan(models, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 1.0)
    models.artifact(tmp_path / "new", models.scaled, 2.0)

    async def use(engine):
        assert not await engine.repository.refresh("net")
        load = Load(engine)
        await load.some()
        (tmp_path / "net").rename(tmp_path / "old")
        (tmp_path / "new").rename(tmp_path / "net")
        await engine.repository.rescan()
        assert await factor(engine) == 2.0  # what was accepted before may be answered by the old one after that
        await load.some()
        await load.end()
        assert set(load.answers) == {("1", 1.0), ("1", 2.0)}

    serve(Source.at(tmp_path / "net"), use=use)


def test_what_replaced_a_model_answers_once_the_workers_of_the_old_one_are_gone(models, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 1.0)
    models.artifact(tmp_path / "new", models.scaled, 2.0)

    async def use(engine):
        watch = asyncio.ensure_future(engine.repository.watch(0.02))
        (tmp_path / "net").rename(tmp_path / "old")
        (tmp_path / "new").rename(tmp_path / "net")
        await asyncio.sleep(0.1)
        assert await factor(engine) == 1.0  # nobody has asked for another one
        os.kill(engine.repository.get("net").pids[0], signal.SIGKILL)
        while True:
            try:
                if await factor(engine) == 2.0:
                    break
            except RequestError:
                await asyncio.sleep(0.02)
        watch.cancel()

    serve(Source.at(tmp_path / "net"), use=use)


def test_what_nobody_expected_does_not_end_the_search_for_new_versions(models, tmp_path, monkeypatch):
    models.artifact(tmp_path / "net" / "1", models.scaled, 2.0)

    def broken(*_):
        raise ValueError("a fault of ours")

    async def use(engine):
        watching = asyncio.ensure_future(engine.repository.watch(0.01))
        with monkeypatch.context() as patch:
            patch.setattr("deploykit.serving.repository.state_now", broken)
            await engine.repository.rescan()
            models.artifact(tmp_path / "net" / "2", models.scaled, 3.0)
            while "a fault of ours" not in str(engine.index()):
                await asyncio.sleep(0.01)
            assert await factor(engine) == 2
        await engine.repository.rescan()
        assert not watching.done() and await factor(engine) == 3
        watching.cancel()

    serve(Source.at(tmp_path / "net"), use=use)


def test_models_are_unloaded_and_loaded(models, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 1.0)
    models.artifact(tmp_path / "other", models.scaled, 5.0)

    async def use(engine):
        asked = [asyncio.ensure_future(factor(engine)) for _ in range(20)]
        await asyncio.sleep(0)
        await engine.unload("net")
        assert await asyncio.gather(*asked) == [1.0] * 20
        await engine.drain()
        assert not engine.model_ready("net") and engine.ready()
        with pytest.raises(NotReady, match="not loaded"):
            await factor(engine)
        assert await factor(engine, "other") == 5.0
        assert [e["reason"] for e in engine.index()] == ["unloaded", ""]
        await engine.repository.rescan()
        assert not engine.model_ready("net")
        await engine.load("net")
        assert await factor(engine) == 1.0
        for call in (engine.load, engine.unload):
            with pytest.raises(UnknownModel, match="no model 'nothing'; expected net, other"):
                await call("nothing")
        shutil.rmtree(tmp_path / "other")
        with pytest.raises(NotReady, match="cannot be loaded"):
            await engine.load("other")
        assert await factor(engine, "other") == 5.0

    serve(Source.at(tmp_path / "net"), Source.at(tmp_path / "other"), use=use)


def test_unknown_models_are_counted_without_their_names(models, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 1.0)

    async def use(engine):
        with pytest.raises(UnknownModel):
            await factor(engine, "made-up")
        text = engine.metrics.text()[0].decode()
        assert 'deploykit_requests_total{model="",outcome="unknown"} 1.0' in text and "made-up" not in text

    serve(Source.at(tmp_path / "net"), use=use)


def test_two_models_of_one_name_are_refused(models, tmp_path):
    models.artifact(tmp_path / "a" / "net", models.scaled, 1.0)
    models.artifact(tmp_path / "b" / "net", models.scaled, 1.0)
    with pytest.raises(DeploykitError, match="two models are called 'net'; give each a name of its own: --name"):
        serve(Source.at(tmp_path / "a" / "net"), Source.at(tmp_path / "b" / "net"), use=None)


def test_a_model_that_does_not_load_keeps_the_server_from_starting(models, tmp_path):
    models.artifact(tmp_path / "net", models.scaled, 1.0)
    models.artifact(tmp_path / "bad", models.scaled, 1.0)
    (tmp_path / "bad" / "model.onnx").write_bytes(b"half")
    with pytest.raises(ArtifactError, match="sha256"):
        serve(Source.at(tmp_path / "net"), Source.at(tmp_path / "bad"), use=None)
