"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from deploykit.extras import require

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LABELS = ("model", "version")


@dataclass(frozen=True, slots=True)
class Gauges:
    """The state of one version of a model, at the moment of a scrape.

    Attributes:
        model: Its name.
        version: Its version.
        waiting: Requests in the queue.
        running: Requests that workers have.
        workers: Workers that answer.
    """

    model: str
    version: str
    waiting: int
    running: int
    workers: int


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """The counters of one version of a model.

    Attributes:
        queue: Seconds that a request waited.
        compute: Seconds that a batch ran.
        rows: Rows of a batch.
        restarts: Workers that died and were replaced.
    """

    queue: Any
    compute: Any
    rows: Any
    restarts: Any

    def ran(self, rows: int, compute_s: float) -> None:
        """A batch ran."""
        self.rows.observe(rows)
        self.compute.observe(compute_s)


class Metrics:
    """All counters of a server, in a registry of their own.

    Args:
        gauges: Gives the state of all models when it is asked for.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
    """

    def __init__(self, gauges: Callable[[], Iterable[Gauges]]) -> None:
        prometheus = require("prometheus_client", extra="serve")
        self._prometheus = prometheus
        self._gauges = gauges
        self._registry = registry = prometheus.CollectorRegistry(auto_describe=True)
        self._requests = prometheus.Counter(
            "deploykit_requests", "Requests, by how they ended.", ("model", "outcome"), registry=registry
        )
        self._seconds = prometheus.Histogram(
            "deploykit_request_seconds", "From a request's acceptance to its answer.", ("model",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._queue = prometheus.Histogram(
            "deploykit_queue_seconds", "How long requests waited for a worker.", _LABELS,
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._compute = prometheus.Histogram(
            "deploykit_compute_seconds", "How long the model ran, a batch.", _LABELS,
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._rows = prometheus.Histogram(
            "deploykit_batch_rows", "Rows that ran at once.", _LABELS, buckets=_ROWS, registry=registry
        )
        self._restarts = prometheus.Counter(
            "deploykit_worker_restarts", "Workers that died and were replaced.", _LABELS, registry=registry
        )
        registry.register(self)
        self._known: dict[tuple[str, str], Any] = {}

    def of(self, model: str, version: str) -> ModelMetrics:
        """The counters of one version of a model."""
        return ModelMetrics(
            *(m.labels(model, version) for m in (self._queue, self._compute, self._rows, self._restarts))
        )

    def ended(self, model: str, outcome: str, seconds: float) -> None:
        """A request ended.

        Args:
            model: Name of a model that there is, or "" for one that there is not: names that clients make up are not
                kept.
            outcome: "ok", "cancelled", or that of a `RequestError`.
            seconds: Since it was accepted.
        """
        key = (model, outcome)
        if key not in self._known:
            self._known[key] = self._requests.labels(*key)
        self._known[key].inc()
        if outcome == "ok":
            if (model, "") not in self._known:
                self._known[model, ""] = self._seconds.labels(model)
            self._known[model, ""].observe(seconds)

    def collect(self) -> Iterable[Any]:
        """Called by the registry: what is read off the models and not counted."""
        family = require("prometheus_client.core", extra="serve").GaugeMetricFamily
        made = {
            name: family(f"deploykit_{name}", text, labels=_LABELS)
            for name, text in (
                ("queue_depth", "Requests that wait for a worker."),
                ("in_flight", "Requests that workers have."),
                ("workers", "Workers that answer."),
            )
        }
        for found in self._gauges():
            labels = (found.model, found.version)
            made["queue_depth"].add_metric(labels, found.waiting)
            made["in_flight"].add_metric(labels, found.running)
            made["workers"].add_metric(labels, found.workers)
        return list(made.values())

    def text(self) -> tuple[bytes, str]:
        """The page that Prometheus reads, and its content type."""
        return self._prometheus.generate_latest(self._registry), self._prometheus.CONTENT_TYPE_LATEST
