"""Comparing two runs: what counts as a change, what is refused, and which conditions fail."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.benchmarks import intervals
from deploykit.benchmarks.compare_changes import Change, Check, judge
from deploykit.benchmarks.compare_reports import CompareOptions, compare_reports
from deploykit.benchmarks.compare_rules import METRICS, parse_rule
from deploykit.benchmarks.intervals import median_interval, ratio_of_medians, ratio_of_percentiles, wilson
from deploykit.benchmarks.page import thinned
from deploykit.benchmarks.report import Report
from deploykit.errors import BenchmarkError


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "_RESAMPLES", 2000)


@pytest.fixture(scope="module")
def make(report_data):
    """Reports of ten rounds."""

    def made(seed=1, scale=1.0, **options):
        return Report(report_data.make_report(seed, scale=scale, **{"rounds": 10, "samples": 120} | options))

    return made


@pytest.fixture(scope="module")
def pair(make):
    return make(1), make(2)


def run(old, new, *rules, **options):
    return compare_reports(old, new, CompareOptions(rules=tuple(parse_rule(r) for r in rules), **options))


def outcomes(found, rule):
    return {j.candidate: j.outcome for j in found.judgements if j.rule == rule}


def changed(report, change):
    data = copy.deepcopy(report.data)
    change(data)
    return Report(data)


# --- conditions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "metric", "op", "limit", "unit"),
    [
        ("latency>5%", "latency", ">", 5, "%"),
        (" p99 >= 1.5 ms ", "p99", ">=", 1.5, "ms"),
        ("accuracy<-0.5pt", "accuracy", "<", -0.5, "pt"),
        ("F1 <= -1e-3", "f1", "<=", -0.001, ""),
        ("size>2mb", "size", ">", 2, "MB"),
        ("throughput<-10%", "throughput", "<", -10, "%"),
        ("latency>.5", "latency", ">", 0.5, "ms"),
        ("verdict<0", "verdict", "<", 0, ""),
    ],
)
def test_conditions_are_read(text, metric, op, limit, unit):
    rule = parse_rule(text)
    assert (rule.metric.name, rule.op, rule.limit, rule.unit) == (metric, op, limit, unit)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("latency", ["latency>5%"]),
        ("latency=5%", ["< <= > >="]),
        ("latency>", ["METRIC"]),
        ("latency>5%%", ["%%"]),
        ("latency>5%;size>1", ["cannot read"]),
        ("speed>5%", ["'speed'", "latency, p90"]),
        ("latency>5MB", ["'MB'", "ms, %"]),
        ("size>5pt", ["'pt'", "MB"]),
        ("latency>1e999%", ["finite"]),
        ("verdict<1%", ["'%'", "a number alone"]),
        ("", ["METRIC"]),
    ],
)
def test_conditions_that_cannot_be_read(text, words):
    with pytest.raises(BenchmarkError) as caught:
        parse_rule(text)
    for word in words:
        assert word in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20) | st.from_regex(r"[a-z0-9]{2,10}(<|>|<=)[-0-9.e]{1,6}(%|ms|pt|MB)?", fullmatch=True))
def test_any_text_is_a_condition_or_an_error(text):
    try:
        rule = parse_rule(text)
    except BenchmarkError:
        return
    assert rule.metric.name in METRICS


@pytest.mark.parametrize(
    ("rule", "low", "high", "outcome"),
    [
        ("latency>5%", 1.06, 1.10, Check.FAILED),
        ("latency>5%", 1.04, 1.20, Check.UNPROVEN),
        ("latency>5%", 0.99, 1.08, Check.OPEN),
        ("latency>5%", 0.99, 1.04, Check.HELD),
        ("latency>0.5ms", 1.06, 1.10, Check.FAILED),
        ("throughput<-5%", 0.90, 0.94, Check.FAILED),
        ("throughput<-5%", 0.94, 1.0, Check.OPEN),
        ("throughput<-5%", 0.96, 1.0, Check.HELD),
    ],
)
def test_a_condition_fails_where_the_whole_interval_is_beyond(rule, low, high, outcome):
    parsed = parse_rule(rule)
    middle = (low + high) / 2
    change = Change(parsed.metric.name, 10.0, 10.0 * middle, low, high, exact=False)
    assert judge(parsed, change, strict=False) is outcome
    beyond = outcome in (Check.FAILED, Check.UNPROVEN)
    assert judge(parsed, change, strict=True) is (Check.FAILED if beyond else Check.HELD)


# --- two runs --------------------------------------------------------------------------------------------------------


def test_the_same_model_twice_passes(pair):
    found = run(*pair, "latency>5%", "p99>5%", "throughput<-5%", "size>0%", "accuracy<0pt", "verdict<0")
    assert not found.failed
    assert set(outcomes(found, "latency>5%")) == {"fp32 on ort:cpu", "simple on ort:cpu", "int8 on ort:cpu"}
    for p in found.pairs[:4]:
        for metric in ("latency", "p99", "throughput", "load"):
            assert p.changes[metric].low <= 1 <= p.changes[metric].high


def test_a_slower_run_fails_and_only_where_it_is_slower(make):
    found = run(make(1), make(2, scale=1.2), "latency>5%", "latency>40%", "p99>5%", "throughput<-5%", "accuracy<-0.5pt")
    assert found.failed
    assert set(outcomes(found, "latency>5%").values()) == {Check.FAILED}
    assert set(outcomes(found, "p99>5%").values()) == {Check.FAILED}
    assert set(outcomes(found, "throughput<-5%").values()) == {Check.FAILED}
    assert set(outcomes(found, "latency>40%").values()) == {Check.HELD}
    assert set(outcomes(found, "accuracy<-0.5pt").values()) == {Check.HELD}
    change = found.pairs[0].changes["latency"]
    assert change.ratio == pytest.approx(1.2, rel=0.05)
    assert change.low < change.ratio < change.high


def test_a_noisier_machine_proves_less(make):
    """The noise floors of both runs widen the interval: what was proven is not any more."""
    old, new = make(1), make(2, scale=1.2)
    noisy = changed(new, lambda d: d.update(noise_floor=0.3))
    assert set(outcomes(run(old, noisy, "latency>5%"), "latency>5%").values()) == {Check.UNPROVEN}
    assert set(outcomes(run(noisy, old, "latency<-5%"), "latency<-5%").values()) == {Check.UNPROVEN}
    assert run(old, noisy, "latency>5%", strict=True).failed


def test_exact_figures_have_no_interval(make):
    old = make(1)

    def worse(data):
        c = data["candidates"][2]
        c["size_bytes"] += 2_000_000
        c["accuracy"] |= {"accuracy": c["accuracy"]["accuracy"] - 0.01, "f1": c["accuracy"]["f1"] - 0.02}
        c["against_reference"] |= {"verdict": "tie"}

    new = changed(old, worse)
    rules = {
        "size>1MB": Check.FAILED, "size>3MB": Check.HELD, "size>10%": Check.FAILED, "accuracy<-0.5pt": Check.FAILED,
        "accuracy<-0.005": Check.FAILED, "accuracy<-2pt": Check.HELD, "f1<-1pt": Check.FAILED, "f1<-3pt": Check.HELD,
        "verdict<0": Check.FAILED,
    }  # fmt: skip
    found = run(old, new, *rules)
    for rule, outcome in rules.items():
        told = outcomes(found, rule)
        assert told["int8 on ort:cpu"] is outcome, rule
        assert {v for k, v in told.items() if k != "int8 on ort:cpu"} == {Check.HELD}
    assert any(j.text == "faster -> tie" for j in found.judgements)


def test_memory_is_the_range_over_rounds(make):
    old = make(1)

    def grow(data):
        for r in data["candidates"][0]["rounds"]:
            r["peak_memory_bytes"] += 50_000_000
        data["candidates"][0]["peak_memory_bytes"] += 50_000_000

    found = run(old, changed(old, grow), "memory>20MB", "memory>60MB")
    assert outcomes(found, "memory>20MB")["fp32 on ort:cpu"] is Check.FAILED
    assert outcomes(found, "memory>60MB")["fp32 on ort:cpu"] is Check.HELD
    assert outcomes(found, "memory>20MB")["simple on ort:cpu"] is Check.HELD


def test_missing_candidates_fail_unless_allowed(make):
    old = make(1)
    new = changed(old, lambda d: d["candidates"].pop(2))
    found = run(old, new, "latency>5%")
    assert found.missing == ("int8 on ort:cpu",)
    assert [j.candidate for j in found.judgements if j.failed] == ["int8 on ort:cpu"]
    assert run(old, new).failed  # without any condition too
    assert not run(old, new, "latency>5%", allow_missing=True).failed
    assert run(new, old, "latency>5%").added == ("int8 on ort:cpu",)
    assert not run(new, old, "latency>5%").failed


def test_a_candidate_that_fell_out_of_the_race_fails(make):
    old = make(1)

    def spoil(data):
        c = data["candidates"][2]
        c["status"] = "wrong outputs: cosine 0.2 is below 0.95"
        for key in [k for k in c if k.endswith("_ms")] + ["rounds", "against_reference", "throughput_per_s"]:
            del c[key]

    new = changed(old, spoil)
    found = run(old, new, "latency>5%")
    assert [(j.candidate, j.failed) for j in found.judgements if not j.rule] == [("int8 on ort:cpu", True)]
    assert "cosine 0.2" in " ".join(found.lines())
    assert not run(old, new, "latency>5%", allow_missing=True).failed
    # What was out of the race before is nobody's loss.
    assert not run(new, old, "latency>5%").failed


def test_metrics_that_no_report_holds(make):
    old, new = make(1, labelled=False), make(2, labelled=False)
    with pytest.raises(BenchmarkError, match=r"accuracy in both.*labels"):
        run(old, new, "accuracy<-1pt")
    with pytest.raises(BenchmarkError, match=r"rate in both.*server"):
        run(old, new, "rate<-1%")
    few = changed(new, lambda d: [c.update(p99_ms=None) for c in d["candidates"]])
    with pytest.raises(BenchmarkError, match="662 samples"):
        run(few, few, "p99>5%")
    # Held then and not now: the condition cannot be shown to hold, so it fails.
    lost = run(old, few, "p99>5%")
    assert lost.failed
    assert "holds no p99" in lost.judgements[0].text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["environment"]["machine"].update(cpu="Other"), ["cpu Imagined CPU 1, now Other"]),
        (lambda d: d["environment"]["machine"].update(cores_allowed=2), ["cores allowed 4, now 2"]),
        (lambda d: d["environment"]["machine"].update(memory_bytes=8 * 2**30), ["memory 16.0 GiB, now 8.0 GiB"]),
        (lambda d: d["environment"]["machine"]["flags"].update(vnni=False, amx_int8=True), ["gone: vnni", "new: amx"]),
        (lambda d: d["environment"]["machine"].update(threads_per_core=1), ["threads per core 2, now 1"]),
    ],
)
def test_other_machines_are_refused(pair, change, words):
    old, new = pair[0], changed(pair[1], change)
    with pytest.raises(BenchmarkError, match="machines differ") as caught:
        run(old, new, "latency>50%")
    for word in [*words, "--allow-different-machine"]:
        assert word in str(caught.value)
    notes = run(old, new, allow_different_machine=True, allow_different_settings=True).notes
    assert any(words[0] in note for note in notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["settings"].update(threads=2), "threads 4, now 2"),
        (lambda d: d["settings"].update(batch=8), "batch 1, now 8"),
        (lambda d: d["settings"].update(precision="native"), "precision fp32, now native"),
        (lambda d: d.update(scenario="server"), "scenario latency, now server"),
        (lambda d: d["settings"].update(slo_p99_ms=20.0), "slo p99 ms not set, now 20"),
        (lambda d: d["candidates"][0]["settings"].update(intra_op_num_threads="1"), "intra_op_num_threads 4, now 1"),
        (lambda d: d["candidates"][0]["accuracy"].update(samples=30), "measured on 600, now 30"),
    ],
)
def test_other_settings_are_refused(pair, change, words):
    old, new = pair[0], changed(pair[1], change)
    with pytest.raises(BenchmarkError, match=r"settings differ.*--allow-different-settings") as caught:
        run(old, new)
    assert words in str(caught.value)
    assert any(words in note for note in run(old, new, allow_different_settings=True).notes)


def test_what_is_noted_and_not_refused(pair):
    def other(data):
        data["environment"]["packages"]["onnxruntime"] = "1.25.0"
        data["environment"]["machine"]["memory_bytes"] -= 2**29
        data["settings"] |= {"threads": 4, "rounds": 20, "inputs": "elsewhere.npz", "seed": 3}

    notes = run(pair[0], changed(pair[1], other)).notes
    assert any("onnxruntime 1.24.0, now 1.25.0" in note for note in notes)
    assert any("elsewhere.npz" in note for note in notes)
    assert not any("memory" in note or "threads" in note for note in notes)


def test_renamed_candidates_are_matched(make):
    old = make(1)

    def rename(data):
        for c in data["candidates"]:
            if c["name"] == "int8":
                c["name"] = "int8-new"

    new = changed(old, rename)
    for renamed in ({"int8": "int8-new"}, {"int8 on ort:cpu": "int8-new on ort:cpu"}):
        found = run(old, new, "latency>5%", renamed=renamed)
        assert not found.missing
        assert "int8 on ort:cpu -> int8-new on ort:cpu" in outcomes(found, "latency>5%")
    with pytest.raises(BenchmarkError, match="old report has no candidate 'nosuch'"):
        run(old, new, renamed={"nosuch": "int8-new"})
    with pytest.raises(BenchmarkError, match="new report has no candidate 'nosuch'"):
        run(old, new, renamed={"int8": "nosuch"})


def test_reports_without_a_common_candidate(make):
    new = changed(make(2), lambda d: [c.update(name=f"x{n}") for n, c in enumerate(d["candidates"])])
    with pytest.raises(BenchmarkError, match=r"no candidate is in both.*--match"):
        run(make(1), new)


def test_an_improvement_that_fails_is_pointed_out(pair):
    assert any("gets better" in note for note in run(*pair, "throughput>50%").notes)
    assert not any("gets better" in note for note in run(*pair, "throughput<-50%", "latency>50%").notes)


def test_the_thinned_copy_of_a_page_compares_like_the_report(make):
    full = make(1, samples=800)
    found = run(full, Report(thinned(full)), "latency>2%", "throughput<-2%")
    for p in found.pairs[:4]:
        assert p.changes["latency"].ratio == pytest.approx(1)
        assert p.changes["throughput"].low == pytest.approx(1 / p.changes["throughput"].high, rel=0.05)
        assert p.changes["p99"].low < 1 < p.changes["p99"].high
    assert any("thinned copy" in note for note in found.notes)


def test_views(make):
    found = run(make(1), make(2, scale=1.2), "latency>5%")
    header, rows = found.table()
    assert header[:4] == ("candidate", "file", "median ms", "latency")
    assert len(rows) == 5
    assert {len(r) for r in rows} == {len(header)}
    markdown = found.to_markdown()
    assert markdown.startswith("**failed: 3 of 3 checks**")
    assert markdown.count("\n| ") == 2 + 5
    data = found.as_dict()
    assert data["failed"] is True
    assert data["judgements"][0] | {"text": ""} == {
        "rule": "latency>5%", "candidate": "fp32 on ort:cpu", "outcome": "FAILED", "text": "",
    }  # fmt: skip
    assert {c["metric"] for c in data["candidates"][0]["changes"]} >= {"latency", "p99", "size", "accuracy"}


# --- intervals -------------------------------------------------------------------------------------------------------


def test_two_runs_of_one_model_rarely_differ():
    """The interval of a ratio that is 1 holds 1, about 95 times in 100, also for few rounds."""
    held = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        old, new = (np.exp(rng.normal(0, 0.03, 5)) for _ in range(2))
        _, low, high = ratio_of_medians(old, new, seed)
        held += low <= 1 <= high
    assert held >= 138


def test_percentiles_of_resampled_rounds():
    rng = np.random.default_rng(0)
    old = [rng.lognormal(0, 0.2, 400) * 1e6 for _ in range(6)]
    new = [r * 1.5 for r in old]
    ratio, low, high = ratio_of_percentiles(old, new, 99.0, 0)
    assert ratio == pytest.approx(1.5)
    assert low < 1.5 < high
    assert high / low < 2
    # One round says nothing about the next.
    assert ratio_of_percentiles(old[:1], new[:1], 90.0, 0)[2] > 1e6


def test_a_median_and_a_share():
    low, high = median_interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert low < 3.0 < high
    assert median_interval([2.0]) == (2.0, 2.0)
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 20) == (pytest.approx(0.8389, abs=1e-4), 1.0)
    assert wilson(0.0, 20)[0] == 0.0
