"""The page of metrics, read by Prometheus's own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from deploykit.serving.metrics import Gauges, Histogram, Metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    text, kind = metrics.text()
    assert kind.startswith("text/plain")
    return {
        (sample.name, tuple(v for _, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_a_histogram_counts_up_to_and_with_its_bounds():
    histogram = Histogram((1, 2, 5))
    for value in (0.5, 1, 1.5, 5, 7):
        histogram.observe(value)
    assert histogram.state() == ([("1.0", 2), ("2.0", 3), ("5.0", 4), ("+Inf", 5)], 15.0)


def test_everything_is_on_the_page_and_the_queue_apart_from_the_computing():
    metrics = Metrics(lambda: [Gauges("net", "2", 3, 1, 4)])
    of = metrics.of("net", "2")
    of.queue.observe(0.25)
    of.ran(8, 0.0625)
    of.restarts += 1
    metrics.ended("net", "ok", 0.5)
    metrics.ended("net", "busy", 0.0)
    metrics.ended("", "unknown", 0.0)
    found = samples(metrics)
    assert found["deploykit_requests_total", ("net", "ok")] == 1
    assert found["deploykit_requests_total", ("net", "busy")] == 1
    assert found["deploykit_requests_total", ("", "unknown")] == 1
    assert found["deploykit_request_seconds_sum", ("net",)] == 0.5
    assert found["deploykit_queue_seconds_sum", ("net", "2")] == 0.25
    assert found["deploykit_compute_seconds_sum", ("net", "2")] == 0.0625
    assert found["deploykit_compute_seconds_bucket", ("0.05", "net", "2")] == 0
    assert found["deploykit_compute_seconds_bucket", ("0.1", "net", "2")] == 1
    assert found["deploykit_batch_rows_bucket", ("8.0", "net", "2")] == 1
    assert found["deploykit_worker_restarts_total", ("net", "2")] == 1
    assert [found[f"deploykit_{name}", ("net", "2")] for name in ("queue_depth", "in_flight", "workers")] == [3, 1, 4]


def test_of_versions_that_are_gone_only_the_last_ones_are_told():
    metrics = Metrics(lambda: [])
    for version in range(1, 51):
        metrics.of("net", str(version)).ran(1, 0.5)
        metrics.gone("net", str(version))
        metrics.of("net", "1").ran(1, 0.5)  # answers again
    told = {labels[1] for name, labels in samples(metrics) if name == "deploykit_batch_rows_count"}
    assert told == {"1", *map(str, range(50 - 32 + 1, 51))}
    assert samples(metrics)["deploykit_batch_rows_count", ("net", "1")] == 51


def test_a_version_that_comes_back_goes_on_counting():
    metrics = Metrics(lambda: [])
    metrics.of("net", "1").queue.observe(1.0)
    metrics.of("net", "1").queue.observe(1.0)
    assert samples(metrics)["deploykit_queue_seconds_count", ("net", "1")] == 2
