"""Jobs on the machines of a Ray cluster.

Every node offers slots: as many as it has of the resource `deploykit` (`ray start --resources '{"deploykit": 4}'`), or
else one for two of its CPUs. A job takes one of them, a measurement takes all of a node's, whoever asks for them; which
job is next is decided here, as for the processes of one machine.
"""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deploykit
from deploykit.errors import WorkerError, first_line
from deploykit.extras import require
from deploykit.machine import allowed_cores
from deploykit.progress import Progress
from deploykit.search import ray_node
from deploykit.search.child import Died, Late
from deploykit.search.machines import Node
from deploykit.search.pool import Pool, Task
from deploykit.search.ray_files import Store, unpack_folder

RESOURCE = "deploykit"
_ASK_S = 120.0
_REACH_S = 10.0
_CLEAR_S = 10.0
_CORES_A_SLOT = 2


@dataclass(frozen=True, slots=True)
class _Share:
    """What a slot of a node is made of."""

    resource: str
    each: float
    all: float

    def options(self, exclusive: bool) -> dict[str, Any]:
        """For `ray.remote(...).options`."""
        amount = self.all if exclusive else self.each
        return {"num_cpus": amount} if self.resource == "CPU" else {"num_cpus": 0, "resources": {RESOURCE: amount}}


class RayExecutor(Pool):
    """Does jobs on a Ray cluster; connects when it is first needed.

    Args:
        address: `ray://host:port` of a cluster elsewhere, `host:port` of one that this machine is part of, or None for
            one of this machine's own that ends with the executor. Where this process is connected to a cluster already,
            it is that one, and stays.
        workers: With `address` None: jobs side by side; None for one on two cores.
        progress: Told what jobs report, their labels in front; over `ray://` when a job has ended.

    Raises, when it connects:
        MissingDependencyError: Ray is not installed.
        WorkerError: There is no cluster, or a node has no DeployKit of this version.
    """

    def __init__(
        self, address: str | None = None, *, workers: int | None = None, progress: Progress | None = None
    ) -> None:
        super().__init__(progress)
        self._address = address
        self._workers = max(1, workers if workers is not None else allowed_cores() // _CORES_A_SLOT)
        self._run_name = uuid.uuid4().hex[:12]
        self._ray: Any = None
        self._owned = False
        self._streams = True
        self._home = ""
        self._nodes: tuple[Node, ...] = ()
        self._shares: dict[str, _Share] = {}
        self._store = Store(lambda data: self._ray.put(data))
        self._flying: dict[int, Any] = {}

    def machines(self) -> tuple[Node, ...]:
        """The nodes of the cluster."""
        with self._lock:
            if self._ray is None:
                if self._closed:
                    raise WorkerError("the executor is closed")
                self._connect()
            return self._nodes

    def _connect(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray = require("ray", extra="ray")
        if not ray.is_initialized():
            self._start(ray)
        self._ray = ray
        self._streams = not ray.util.client.ray.is_connected()
        try:
            if self._streams:
                self._home = ray.get_runtime_context().get_node_id()
            self._nodes = tuple(self._greet(ray, [n for n in ray.nodes() if n["Alive"]]))
        except BaseException:
            self._disconnect()
            raise

    def _start(self, ray: Any) -> None:
        options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if self._address is None:
            # Its processes have to find this very copy of DeployKit, and what this process finds besides.
            home = str(Path(deploykit.__file__).resolve().parent.parent)
            path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
            options |= {
                "address": "local", "include_dashboard": False, "resources": {RESOURCE: self._workers},
                "num_cpus": max(allowed_cores(), self._workers), "runtime_env": {"env_vars": {"PYTHONPATH": path}},
            }  # fmt: skip
        else:
            options["address"] = self._address
        try:
            if self._address is not None:
                # Ray itself would ask again for minutes.
                host, _, port = self._address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, int(port)), _REACH_S).close()
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError, ray.exceptions.RayError) as exc:
            raise WorkerError(
                f"no Ray cluster at {self._address or 'this machine'} ({first_line(exc)})",
                expected="ray://HOST:10001, or HOST:6379 on a machine of the cluster",
                hint="ray status, on a machine of the cluster, tells whether it runs; one that asks for a token wants "
                "RAY_AUTH_MODE=token here, too",
            ) from exc
        self._owned = True

    def _greet(self, ray: Any, alive: list[dict[str, Any]]) -> Iterator[Node]:
        """Ask every node what it is."""

        def probe() -> dict[str, Any]:
            # Travels as code, since DeployKit may be missing there.
            try:
                import deploykit
                from deploykit.search.machines import machine_of
            except ImportError as exc:
                return {"missing": str(exc)}
            return {"version": deploykit.__version__, "machine": machine_of(), "file": deploykit.__file__}

        asked = [ray.remote(probe).options(num_cpus=0, **self._on(n["NodeID"])).remote() for n in alive]
        for node, ref in zip(alive, asked, strict=True):
            where = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            try:
                found = ray.get(ref, timeout=_ASK_S)
            except ray.exceptions.RayError as exc:
                raise WorkerError(f"the Ray node {where} does not answer ({first_line(exc)})") from exc
            if found.get("version") != deploykit.__version__:
                has = f"DeployKit {found['version']}" if "version" in found else f"no DeployKit ({found['missing']})"
                raise WorkerError(
                    f"the Ray node {where} has {has}", expected=f"version {deploykit.__version__}, as here",
                    hint="install the same version on every machine of the cluster",
                )  # fmt: skip
            if node["NodeID"] == self._home and not Path(found["file"]).samefile(deploykit.__file__):
                raise WorkerError(
                    f"Ray's processes on this machine find another DeployKit, {found['file']}",
                    expected=deploykit.__file__, hint="start from a directory that holds no other copy",
                )  # fmt: skip
            slots, self._shares[node["NodeID"]] = self._share(node["Resources"], where)
            yield Node(node["NodeID"], slots, found["machine"], node["NodeManagerAddress"])

    def _share(self, resources: dict[str, float], where: str) -> tuple[int, _Share]:
        offered = int(resources.get(RESOURCE, 0))
        if offered:
            return offered, _Share(RESOURCE, 1, offered)
        cpus = int(resources.get("CPU", 0))
        if not cpus:
            raise WorkerError(
                f"the Ray node {where} offers neither CPUs nor the resource {RESOURCE!r}",
                hint=f"start it with --resources '{{\"{RESOURCE}\": 1}}'",
            )
        if self._progress is not None:
            self._progress.note(
                f"the Ray node {where} has no resource {RESOURCE!r}: a measurement takes all of its {cpus} CPUs instead"
            )
        each = min(_CORES_A_SLOT, cpus)
        return cpus // each, _Share("CPU", each, cpus)

    def _on(self, node: str) -> dict[str, Any]:
        """Options of a task that may run on one node only, and that only we do again."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity

        return {"scheduling_strategy": Affinity(node, soft=False), "max_retries": 0}

    def _attempt(self, task: Task, place: str) -> Iterator[dict[str, Any]]:
        job, ray = task.job, self._ray
        told: dict[str, Any] = {"deed": job.deed, "params": dict(job.params), "stall_s": job.stall_s}
        packed: dict[str, Any] = {}
        if place == self._home:  # its files are ours
            told |= {"folder": str(task.folder.absolute())}
            told |= {"inputs": {name: str(path.absolute()) for name, path in job.inputs.items()}}
        else:
            packed = self._store.pack(job.inputs)
        options = {**self._on(place), **self._shares[place].options(job.exclusive)}
        try:
            for found in self._send(task, options, told, packed):
                if "died" in found:
                    raise Died(found["died"])
                if "late" in found:
                    raise Late(found["late"])
                if "wrote" in found:
                    unpack_folder(found["wrote"], task.folder)
                else:
                    yield found
        except ray.exceptions.RayTaskError:  # a bug of ours on the node
            raise
        except ray.exceptions.RayError as exc:
            self._forget_dead()
            raise Died(f"Ray's process ended ({first_line(exc)})") from exc
        finally:
            self._store.release(packed)
            with self._lock:
                self._flying.pop(id(task), None)

    def _send(self, task: Task, options: dict[str, Any], told: Any, packed: Any) -> Iterator[dict[str, Any]]:
        arguments = told, task.job.timeout_s, packed, self._run_name
        with self._lock:
            if self._closed:
                raise Died("the executor is closed")
            if self._streams:
                remote = self._ray.remote(ray_node.perform).options(num_returns="streaming", **options)
            else:
                remote = self._ray.remote(ray_node.collect).options(**options)
            sent = self._flying[id(task)] = remote.remote(*arguments)
        if self._streams:
            for ref in sent:
                yield self._ray.get(ref)
        else:
            yield from self._ray.get(sent)

    def _stop(self) -> None:
        if self._ray is None:
            return
        with self._lock:
            flying = list(self._flying.values())
        for sent in flying:
            with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
                self._ray.cancel(sent, force=True)

    def _leave(self) -> None:
        if self._ray is not None:
            self._disconnect()

    def _forget_dead(self) -> None:
        """Give nothing more to nodes that are gone."""
        alive = {n["NodeID"] for n in self._ray.nodes() if n["Alive"]}
        with self._lock:
            self._nodes = tuple(n for n in self._nodes if n.name in alive)
            self._places = [p for p in self._places or [] if p.name in alive]

    def _disconnect(self) -> None:
        ray = self._ray
        if ray.is_initialized():
            nodes = [n.name for n in self._nodes if n.name != self._home]
            with contextlib.suppress(ray.exceptions.RayError):
                clear = ray.remote(ray_node.clear)
                cleared = [clear.options(num_cpus=0, **self._on(n)).remote(self._run_name) for n in nodes]
                ray.wait(cleared, num_returns=len(cleared), timeout=_CLEAR_S) if cleared else None
            if self._owned:
                ray.shutdown()
        self._ray = None
