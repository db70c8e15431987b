"""What the server counts, for Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from deploykit.extras import require

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LABELS = ("model", "version")
# Of so many versions that answer no more the figures are still told; of all there ever were, the page would grow for
# as long as the server lives.
_MOST_GONE = 32


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


class Histogram:
    """How often something was how large; a request passes several, so that it only counts.

    Args:
        bounds: Upper ends of its buckets, rising.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one more."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def state(self) -> tuple[list[tuple[str, int]], float]:
        """Upper ends with how many are no larger, and the sum, as Prometheus wants them."""
        ends = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        return list(zip(ends, accumulate(self._counts), strict=True)), self._sum


class ModelMetrics:
    """What is counted of one version of a model.

    Attributes:
        queue: Seconds that requests waited.
        compute: Seconds that batches ran.
        rows: Rows of batches.
        restarts: Workers that died and were replaced.
    """

    __slots__ = ("compute", "queue", "restarts", "rows")

    def __init__(self) -> None:
        self.queue = Histogram(_SECONDS)
        self.compute = Histogram(_SECONDS)
        self.rows = Histogram(_ROWS)
        self.restarts = 0

    def ran(self, rows: int, compute_s: float) -> None:
        """A batch ran."""
        self.rows.observe(rows)
        self.compute.observe(compute_s)


class Metrics:
    """All that a server counts. For one thread.

    Args:
        gauges: Gives the state of all models when it is asked for.
    """

    def __init__(self, gauges: Callable[[], Iterable[Gauges]]) -> None:
        self._gauges = gauges
        self._requests: Counter[tuple[str, str]] = Counter()
        self._seconds: dict[str, Histogram] = {}
        self._models: dict[tuple[str, str], ModelMetrics] = {}
        self._gone: dict[tuple[str, str], None] = {}

    def of(self, model: str, version: str) -> ModelMetrics:
        """What is counted of one version of a model."""
        self._gone.pop((model, version), None)
        return self._models.setdefault((model, version), ModelMetrics())

    def gone(self, model: str, version: str) -> None:
        """A version answers no more: its figures stay for a while, so that the last ones are read, too."""
        self._gone.pop((model, version), None)
        self._gone[model, version] = None
        while len(self._gone) > _MOST_GONE:
            oldest = next(iter(self._gone))
            del self._gone[oldest]
            self._models.pop(oldest, None)

    def ended(self, model: str, outcome: str, seconds: float) -> None:
        """A request ended.

        Args:
            model: Name of a model that there is, or "" for one that there is not: names that clients make up are not
                kept.
            outcome: "ok", "cancelled", or that of a `RequestError`.
            seconds: Since it was accepted.
        """
        self._requests[model, outcome] += 1
        if outcome == "ok":
            if model not in self._seconds:
                self._seconds[model] = Histogram(_SECONDS)
            self._seconds[model].observe(seconds)

    def collect(self) -> Iterable[Any]:
        """Everything, as families of Prometheus; its registry calls this.

        Raises:
            MissingDependencyError: prometheus-client is not installed.
        """
        core = require("prometheus_client.core", extra="serve")
        requests = core.CounterMetricFamily(
            "deploykit_requests", "Requests, by how they ended.", labels=("model", "outcome")
        )
        for labels, count in self._requests.items():
            requests.add_metric(labels, count)
        yield requests
        seconds = core.HistogramMetricFamily(
            "deploykit_request_seconds", "From a request's acceptance to its answer.", labels=("model",)
        )
        for model, histogram in self._seconds.items():
            seconds.add_metric((model,), *histogram.state())
        yield seconds
        for name, text in (
            ("queue", "How long requests waited for a worker, in seconds."),
            ("compute", "How long the model ran, a batch, in seconds."),
            ("rows", "Rows that ran at once."),
        ):
            full = "deploykit_batch_rows" if name == "rows" else f"deploykit_{name}_seconds"
            family = core.HistogramMetricFamily(full, text, labels=_LABELS)
            for labels, found in self._models.items():
                family.add_metric(labels, *getattr(found, name).state())
            yield family
        restarts = core.CounterMetricFamily(
            "deploykit_worker_restarts", "Workers that died and were replaced.", labels=_LABELS
        )
        for labels, found in self._models.items():
            restarts.add_metric(labels, found.restarts)
        yield restarts
        yield from self._states(core.GaugeMetricFamily)

    def _states(self, family: Any) -> Iterable[Any]:
        """What is read off the models and not counted."""
        depth = family("deploykit_queue_depth", "Requests that wait for a worker.", labels=_LABELS)
        in_flight = family("deploykit_in_flight", "Requests that workers have.", labels=_LABELS)
        workers = family("deploykit_workers", "Workers that answer.", labels=_LABELS)
        for found in self._gauges():
            labels = (found.model, found.version)
            depth.add_metric(labels, found.waiting)
            in_flight.add_metric(labels, found.running)
            workers.add_metric(labels, found.workers)
        return depth, in_flight, workers

    def text(self) -> tuple[bytes, str]:
        """The page that Prometheus reads, and its content type.

        Raises:
            MissingDependencyError: prometheus-client is not installed.
        """
        prometheus = require("prometheus_client", extra="serve")
        registry = prometheus.CollectorRegistry(auto_describe=False)
        registry.register(self)
        return prometheus.generate_latest(registry), prometheus.CONTENT_TYPE_LATEST
