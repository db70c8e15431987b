"""The models of a server: loaded, swapped for newer versions while they answer, and unloaded."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deploykit.errors import ArtifactError, DeploykitError
from deploykit.serving.dispatch import Hire, hire
from deploykit.serving.loaded import Loaded, Options, Source, State, load, state_now, versions_in
from deploykit.serving.metrics import Gauges, Metrics
from deploykit.serving.requests import NotReady, UnknownModel
from deploykit.serving.served import Served

log = logging.getLogger("deploykit.serving")

READY, LOADING, UNAVAILABLE = "READY", "LOADING", "UNAVAILABLE"


@dataclass(slots=True, eq=False)
class _Model:
    """A model and the versions of it that answer.

    Attributes:
        source: Where it comes from.
        current: What answers by version, oldest first.
        wanted: Whether it is to answer, which it is not once it was unloaded.
        states: Of versions that are to answer and do not: LOADING or UNAVAILABLE, and why.
        refused: What could not be loaded by version, which is not tried again until it changes.
    """

    source: Source
    current: dict[str, Served] = field(default_factory=dict)
    wanted: bool = True
    states: dict[str, tuple[str, str]] = field(default_factory=dict)
    refused: dict[str, State] = field(default_factory=dict)
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
        self._loading: set[Served] = set()
        self._looking = asyncio.Lock()
        self._look_waits = False
        self._ending = False
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
        return all(
            m.current and all(served.ready for served in m.current.values()) for m in self._models.values() if m.wanted
        )

    def get(self, name: str, version: str | None = None) -> Served:
        """The version of a model that answers: the one that is named, else the newest that does.

        Raises:
            UnknownModel: There is no such model, or not in this version.
            NotReady: It does not answer yet, or not any more.
        """
        model = self._model(name)
        if version:
            if version in model.current:
                return model.current[version]
            failed = any(state == UNAVAILABLE for state, _ in model.states.values())
            if model.current or (model.wanted and failed):
                known = ", ".join(model.current) or None
                raise UnknownModel(f"there is no version {version!r:.80} of {name!r}", expected=known)
        elif model.current:
            return model.current[next(reversed(model.current))]
        loading = model.wanted or any(state == LOADING for state, _ in model.states.values())
        raise NotReady(f"{name!r} is being loaded" if loading else f"{name!r} is not loaded")

    def versions(self, name: str) -> tuple[str, ...]:
        """The versions of a model that answer, oldest first.

        Raises:
            UnknownModel: There is no such model.
        """
        return tuple(self._model(name).current)

    def _model(self, name: str) -> _Model:
        if name not in self._models:
            raise UnknownModel(f"there is no model {name!r:.200}", expected=", ".join(self._models))
        return self._models[name]

    def index(self) -> list[dict[str, str]]:
        """Every model and version with its state."""
        found = []
        for name, model in self._models.items():
            versions = versions_in(model.source.path) if model.source.versioned else ("1",)
            wanted = self._wanted(model, versions)
            for version in sorted({*versions, *model.current}, key=int):
                if version in model.current:
                    live = model.current[version].ready
                    state, reason = (READY, "") if live else (UNAVAILABLE, "no worker answers")
                elif model.wanted:
                    other = (LOADING, "") if version in wanted else (UNAVAILABLE, self._options.versions.rule)
                    state, reason = model.states.get(version, other)
                else:
                    state, reason = model.states.get(version, (UNAVAILABLE, "unloaded"))
                found.append({"name": name, "version": version, "state": state, "reason": reason})
        return found

    def _gauges(self) -> Iterable[Gauges]:
        for name, model in self._models.items():
            for version, at in model.current.items():
                yield Gauges(name, version, at.waiting, at.running, len(at.pids))

    # --- changes ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load all.

        Raises:
            DeploykitError: One cannot be loaded.
        """
        for name in self._models:
            await self.refresh(name)

    async def refresh(self, name: str, *, again: bool = True, unloaded: bool = True) -> bool:
        """Load what is to answer of a model and does not; what answered goes on until all of that does.

        Args:
            name: Of the model.
            again: Also what could not be loaded before.
            unloaded: Also a model that was unloaded: once a version of it answers, it is to answer again.

        Returns:
            Whether other versions answer now.

        Raises:
            UnknownModel: There is no such model.
            NotReady: The server is ending.
            DeploykitError: One cannot be loaded; what answered goes on.
        """
        model = self._model(name)
        async with model.lock:
            # It may have been unloaded while we waited.
            if not (model.wanted or unloaded):
                return False
            changed, failed = False, list[Exception]()
            found = await asyncio.to_thread(model.source.found)
            wanted = self._wanted(model, tuple(found))
            model.states = {v: state for v, state in model.states.items() if v in wanted}
            model.refused = {v: state for v, state in model.refused.items() if v in wanted}
            for version in self._missing(model, wanted):
                failed.append(
                    ArtifactError(f"{model.source.path} holds no version {version}", expected=", ".join(found))
                )
            for version in (v for v in wanted if v in found):
                try:
                    changed = await self._refresh_one(model, version, again=again) or changed
                except Exception as exc:  # noqa: BLE001 - it is raised once the others are loaded
                    failed.append(exc)
            model.wanted = model.wanted or bool(model.current)
            if all(version in model.current for version in wanted):
                for version in [v for v in model.current if v not in wanted]:
                    log.info("%s: version %s answers no more", name, version)
                    self._leave(model, model.current.pop(version))
                    changed = True
            for other in failed[1:]:
                log.error("%s: %s", name, other)
            if failed:
                raise failed[0]
            return changed

    def _wanted(self, model: _Model, found: Sequence[str]) -> tuple[str, ...]:
        """Versions of a model that are to answer; a model that is no directory of versions has one."""
        return self._options.versions.choose(found, model.current) if model.source.versioned else tuple(found)

    def _missing(self, model: _Model, wanted: Sequence[str]) -> list[str]:
        """Versions that were named and are not there."""
        return [v for v in self._options.versions.only if model.source.versioned and v not in wanted]

    async def _refresh_one(self, model: _Model, version: str, *, again: bool) -> bool:
        state: State | None = None
        try:
            state = await asyncio.to_thread(state_now, model.source, version)
            at = model.current.get(version)
            if at is not None and state.digest == at.loaded.digest:
                model.states.pop(version, None)
                return False
            if not again and state == model.refused.get(version):
                return False
            model.states[version] = (LOADING, "")
            await self._swap(model, await asyncio.to_thread(load, model.source, self._options, version))
        except Exception as exc:
            model.states[version] = (UNAVAILABLE, str(exc))
            model.refused.pop(version, None)
            if state is not None:
                model.refused[version] = state
            raise
        model.states.pop(version, None)
        model.refused.pop(version, None)
        return True

    async def _swap(self, model: _Model, loaded: Loaded) -> None:
        log.info("loading %s version %s from %s", loaded.name, loaded.version, loaded.path)
        self._check_ending()
        made = Served(loaded, self._options, self.metrics, self._hire)
        self._all.add(made)
        self._loading.add(made)
        try:
            await made.start()
        except BaseException as exc:
            self._loading.discard(made)
            self._forget(model, loaded.version)
            if isinstance(exc, Exception):
                self._check_ending()
            raise
        self._loading.discard(made)
        log.info("%s: version %s answers", loaded.name, loaded.version)
        old = model.current.get(loaded.version)
        model.current = dict(sorted({**model.current, loaded.version: made}.items(), key=lambda item: int(item[0])))
        if old is not None:
            self._leave(model, old)

    def _check_ending(self) -> None:
        if self._ending:
            raise NotReady("the server is ending") from None

    def _forget(self, model: _Model, version: str) -> None:
        """Nothing more is counted of a version, unless another of the same number answers or is to."""
        name = model.source.name
        if version not in model.current and all(
            (made.loaded.name, made.loaded.version) != (name, version) for made in self._loading
        ):
            self.metrics.gone(name, version)

    def _leave(self, model: _Model, served: Served) -> None:
        """Have a version that gets no more requests answer those that it has, and then end."""

        async def leave() -> None:
            await served.drain()
            await served.stop()
            self._forget(model, served.loaded.version)

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
            model.states.clear()
            old, model.current = model.current, {}
            for served in old.values():
                self._leave(model, served)

    async def rescan(self) -> None:
        """Look for newer versions of all models that are to answer; what cannot be loaded is logged.

        Of several calls while one looks, one looks once more: by then it sees what all of them would.
        """
        if self._look_waits:
            return
        self._look_waits = True
        async with self._looking:
            self._look_waits = False
            for name, model in self._models.items():
                if model.wanted:
                    await self._try(name, again=True)

    async def watch(self, pause_s: float) -> None:
        """Look for new versions for ever, and for what replaced a model whose workers cannot be started any more."""
        while True:
            await asyncio.sleep(pause_s)
            for name, model in self._models.items():
                if model.wanted and not model.lock.locked() and await self._is_stale(model):
                    await self._try(name, again=False)

    async def _is_stale(self, model: _Model) -> bool:
        if any(served.fault for served in model.current.values()):
            return True
        if not model.source.versioned:
            return False
        try:
            found = await asyncio.to_thread(model.source.found)
        except (DeploykitError, OSError):  # all are gone, or cannot be seen: what answers goes on
            return False
        except Exception:  # as in `_try`
            log.exception("%s: its versions cannot be looked at", model.source.name)
            return False
        return set(self._wanted(model, tuple(found))) != set(model.current)

    async def _try(self, name: str, *, again: bool) -> None:
        try:
            await self.refresh(name, again=again, unloaded=False)
        except Exception as exc:  # who looks for new versions has to go on looking
            known = isinstance(exc, DeploykitError)
            log.error("%s goes on as it is: %s", name, exc, exc_info=not known)

    def load_no_more(self) -> None:
        """Give up what is still being loaded: the server is ending, and it would answer nothing."""
        self._ending = True
        for served in self._loading:
            served.kill()

    async def drain(self) -> None:
        """Wait until every accepted request is answered."""
        await asyncio.gather(*(at.drain() for m in self._models.values() for at in m.current.values()))
        await asyncio.gather(*self._leaving)

    def kill(self) -> None:
        """End all workers without waiting for anything."""
        for served in self._all:
            served.kill()

    async def stop(self) -> None:
        """End all workers now."""
        self.load_no_more()
        await asyncio.gather(*(at.stop() for m in self._models.values() for at in m.current.values()))
        for task in tuple(self._leaving):
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
