"""The models of a server: loaded, swapped for newer versions while they answer, and unloaded."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deploykit.errors import DeploykitError
from deploykit.serving.dispatch import Hire, hire
from deploykit.serving.loaded import Loaded, Options, Source, State, load, state_now, versions_in
from deploykit.serving.metrics import Gauges, Metrics
from deploykit.serving.requests import NotReady, UnknownModel
from deploykit.serving.served import Served

log = logging.getLogger("deploykit.serving")

READY, LOADING, UNAVAILABLE = "READY", "LOADING", "UNAVAILABLE"


@dataclass(slots=True, eq=False)
class _Model:
    """A model and the version of it that answers.

    Attributes:
        source: Where it comes from.
        current: What answers; None where nothing does.
        wanted: Whether it is to answer, which it is not once it was unloaded.
        state: READY, LOADING or UNAVAILABLE.
        reason: Why the newest version does not answer.
        refused: What could not be loaded, which is not tried again until it changes.
    """

    source: Source
    current: Served | None = None
    wanted: bool = True
    state: str = LOADING
    reason: str = ""
    refused: State | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Repository:
    """Several models by name.

    Args:
        sources: Where they come from.
        options: How they are served.
        hire: Makes a worker.

    Raises:
        DeploykitError: Two have one name.
    """

    def __init__(self, sources: Sequence[Source], options: Options, hire: Hire = hire) -> None:
        self._options = options
        self._hire = hire
        self._models = {source.name: _Model(source) for source in sources}
        if len(self._models) != len(sources):
            names = [source.name for source in sources]
            twice = next(name for name in names if names.count(name) > 1)
            raise DeploykitError(f"two models are called {twice!r}", hint="give each a name of its own: --name")
        self._leaving: set[asyncio.Task[None]] = set()
        self._all: weakref.WeakSet[Served] = weakref.WeakSet()
        self.metrics = Metrics(self._gauges)

    # --- what there is ------------------------------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """Names of all models."""
        return tuple(self._models)

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def ready(self) -> bool:
        """Whether every model that is to answer does."""
        return all(m.current is not None and m.current.ready for m in self._models.values() if m.wanted)

    def get(self, name: str, version: str | None = None) -> Served:
        """The version of a model that answers.

        Raises:
            UnknownModel: There is no such model, or not in this version.
            NotReady: It does not answer yet, or not any more.
        """
        model = self._model(name)
        if model.current is None:
            if version is not None and model.wanted and model.state == UNAVAILABLE:
                raise UnknownModel(f"there is no version {version!r:.80} of {name!r}")
            raise NotReady(f"{name!r} is not loaded" if not model.wanted else f"{name!r} is being loaded")
        if version not in (None, "", model.current.loaded.version):
            raise UnknownModel(
                f"there is no version {version!r:.80} of {name!r}", expected=model.current.loaded.version
            )
        return model.current

    def _model(self, name: str) -> _Model:
        if name not in self._models:
            raise UnknownModel(f"there is no model {name!r:.200}", expected=", ".join(self._models))
        return self._models[name]

    def index(self) -> list[dict[str, str]]:
        """Every model and version with its state."""
        found = []
        for name, model in self._models.items():
            versions = versions_in(model.source.path) if model.source.versioned else ("1",)
            current = model.current.loaded.version if model.current else ""
            for version in dict.fromkeys((*versions, *([current] if current else []))):
                if version == current:
                    live = model.current is not None and model.current.ready
                    state, reason = (READY, "") if live else (UNAVAILABLE, "no worker answers")
                elif version == versions[-1] and model.wanted:
                    state, reason = model.state, model.reason
                else:
                    state, reason = UNAVAILABLE, "not the newest version" if model.wanted else "unloaded"
                found.append({"name": name, "version": version, "state": state, "reason": reason})
        return found

    def _gauges(self) -> Iterable[Gauges]:
        for name, model in self._models.items():
            if (at := model.current) is not None:
                yield Gauges(name, at.loaded.version, at.waiting, at.running, len(at.pids))

    # --- changes ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load all.

        Raises:
            DeploykitError: One cannot be loaded.
        """
        for name in self._models:
            await self.refresh(name)

    async def refresh(self, name: str, *, again: bool = True) -> bool:
        """Load what is newest of a model, if it is not what answers; the old version answers until the new one does.

        Args:
            name: Of the model.
            again: Also what could not be loaded before.

        Returns:
            Whether another version answers now.

        Raises:
            UnknownModel: There is no such model.
            DeploykitError: It cannot be loaded; what answered goes on.
        """
        model = self._model(name)
        async with model.lock:
            model.wanted = True
            newest: State | None = None
            try:
                newest = await asyncio.to_thread(state_now, model.source)
                at = model.current.loaded if model.current else None
                if at is not None and (newest.version, newest.digest) == (at.version, at.digest):
                    return False
                if not again and newest == model.refused:
                    return False
                model.state, model.reason = LOADING, ""
                await self._swap(model, await asyncio.to_thread(load, model.source, self._options))
            except Exception as exc:
                model.state, model.reason, model.refused = UNAVAILABLE, str(exc), newest
                raise
            model.state, model.refused = READY, None
            return True

    async def _swap(self, model: _Model, loaded: Loaded) -> None:
        log.info("loading %s version %s from %s", loaded.name, loaded.version, loaded.path)
        made = Served(loaded, self._options, self.metrics, self._hire)
        self._all.add(made)
        await made.start()
        old, model.current = model.current, made
        if old is not None:
            log.info("%s: version %s answers in place of %s", loaded.name, loaded.version, old.loaded.version)
            self._leave(old)

    def _leave(self, served: Served) -> None:
        """Have a version that gets no more requests answer those that it has, and then end."""

        async def leave() -> None:
            await served.drain()
            await served.stop()

        task = asyncio.get_running_loop().create_task(leave())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def unload(self, name: str) -> None:
        """Have a model answer no more requests, once the accepted ones are answered.

        Raises:
            UnknownModel: There is no such model.
        """
        model = self._model(name)
        async with model.lock:
            model.wanted = False
            model.state, model.reason = UNAVAILABLE, "unloaded"
            old, model.current = model.current, None
            if old is not None:
                self._leave(old)

    async def rescan(self, *, again: bool = True) -> None:
        """Look for newer versions of all models that are to answer; what cannot be loaded is logged."""
        for name, model in self._models.items():
            if not model.wanted or (model.lock.locked() and not again):
                continue
            await self._try(name, again=again)

    async def watch(self, pause_s: float) -> None:
        """Look for new versions for ever, and for what replaced a model whose workers cannot be started any more."""
        while True:
            await asyncio.sleep(pause_s)
            for name, model in self._models.items():
                if model.wanted and not model.lock.locked() and await self._is_stale(model):
                    await self._try(name, again=False)

    async def _is_stale(self, model: _Model) -> bool:
        if model.current is not None and model.current.fault:
            return True
        if not model.source.versioned:
            return False
        try:
            version, _ = await asyncio.to_thread(model.source.newest)
        except (DeploykitError, OSError):  # all are gone, or cannot be seen: what answers goes on
            return False
        return model.current is None or version != model.current.loaded.version

    async def _try(self, name: str, *, again: bool) -> None:
        try:
            await self.refresh(name, again=again)
        except Exception as exc:  # who looks for new versions has to go on looking
            known = isinstance(exc, DeploykitError)
            log.error("%s goes on as it is: %s", name, exc, exc_info=not known)

    async def drain(self) -> None:
        """Wait until every accepted request is answered."""
        await asyncio.gather(*(m.current.drain() for m in self._models.values() if m.current is not None))
        await asyncio.gather(*self._leaving)

    def kill(self) -> None:
        """End all workers without waiting for anything."""
        for served in self._all:
            served.kill()

    async def stop(self) -> None:
        """End all workers now."""
        await asyncio.gather(*(m.current.stop() for m in self._models.values() if m.current is not None))
        for task in tuple(self._leaving):
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
