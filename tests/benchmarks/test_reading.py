"""Any file is a report of a known version, or an error that says what it is; what was read can be shown."""

import copy
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploykit.benchmarks import reading
from deploykit.benchmarks.markdown import to_markdown
from deploykit.benchmarks.page import thinned, to_html
from deploykit.benchmarks.reading import parse_report, read_report
from deploykit.benchmarks.report import Report
from deploykit.benchmarks.schema import report_schema, what_is_wrong
from deploykit.benchmarks.wording import visible
from deploykit.cli.benchmark import show_report
from deploykit.errors import BenchmarkError, DeploykitError

LIMITED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@pytest.fixture(scope="module")
def small(report_data):
    """A report with everything in it and few samples."""
    data = report_data.add_optional(report_data.make_report(rounds=3))
    for rounds in [*(c.get("rounds", []) for c in data["candidates"]), data["reference_again"]]:
        for r in rounds:
            r["samples_ns"] = r["samples_ns"][:12]
    return data


def first_version(data):
    """The same as version 1 wrote it: no scenario, no clock, none of the later figures."""
    old = copy.deepcopy(data) | {"schema_version": 1}
    for key in ("scenario", "tuning", "explain"):
        old.pop(key, None)
    for key in ("scenario", "concurrency", "slo_p99_ms"):
        old["settings"].pop(key)
    for c in old["candidates"]:
        for key in ("p95_ms", "p999_ms", "drift", "tuned", "confirmed", "sweep", "knee", "rates", "highest_rate_per_s"):
            c.pop(key, None)
    for rounds in [*(c.get("rounds", []) for c in old["candidates"]), old["reference_again"]]:
        for r in rounds:
            del r["started_s"], r["round"]
    return old


def test_both_versions_are_read(small, tmp_path):
    for name, data in (("v2", small), ("v1", first_version(small))):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        report = read_report(path)
        assert [c["name"] for c in report.candidates] == [c["name"] for c in small["candidates"]]
        assert report.candidates[0]["rounds"] == data["candidates"][0]["rounds"]
        assert "int8" in report.headline()


def test_a_measured_report_is_read_whole(small):
    """What is written by `to_json` comes back the same."""
    assert parse_report(Report(small).to_json(), "x").data == json.loads(json.dumps(small))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no JSON", "deploykit benchmark -o"]),
        (b'{"schema_version": 2, "candi', ["no JSON, or only part"]),
        (b"\xff\xfe\x00", ["cannot be read"]),
        (b"[1, 2]", ["no report"]),
        (b'{"name": "manifest"}', ["no report"]),
        (b'{"schema_version": 3, "candidates": []}', ["version 3", "1 or 2", "update"]),
        (b'{"schema_version": true, "candidates": []}', ["version True"]),
        (b'{"schema_version": "2", "candidates": []}', ["'2'"]),
        (b'{"schema_version": 2, "candidates": []}', ["damaged"]),
        (b"[" * 200_000, ["nested too deeply"]),
        (b'{"schema_version": 2, "candidates": ' + b"9" * 5000 + b"}", ["no JSON"]),
    ],
)
def test_what_is_no_report_says_so(tmp_path, content, words):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(BenchmarkError) as caught:
        read_report(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_places_that_are_no_files(tmp_path):
    for path, word in ((tmp_path / "missing", "does not exist"), (tmp_path, "directory"), ("/dev/null", "regular")):
        with pytest.raises(BenchmarkError, match=word):
            read_report(path)


def test_huge_files_are_not_read(small, tmp_path, monkeypatch):
    path = tmp_path / "large.json"
    path.write_text(json.dumps(small), encoding="utf-8")
    monkeypatch.setattr(reading, "LIMIT_BYTES", path.stat().st_size - 1)
    with pytest.raises(BenchmarkError, match="GB"):
        read_report(path)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d["candidates"][0]["rounds"][0].update(samples_ns=[]), "candidates.0.rounds.0.samples_ns"),
        (lambda d: d["candidates"][2]["rounds"][0]["samples_ns"].append(0), "samples_ns.12"),
        (lambda d: d["candidates"][2]["rounds"][0]["samples_ns"].append(2.5), "samples_ns.12"),
        (lambda d: d["candidates"][1].update(median_ms=float("nan")), "candidates.1.median_ms"),
        (lambda d: d["candidates"][1].pop("median_ms"), "candidates.1"),
        (lambda d: d["candidates"][0].pop("rounds"), "candidates.0"),
        (lambda d: d["settings"].pop("batch"), "settings.batch"),
        (lambda d: d["environment"]["machine"].update(flags=None), "environment.machine.flags"),
        (lambda d: d.update(noise_floor="0.01"), "noise_floor"),
    ],
)
def test_damage_is_named_by_its_place(small, change, place):
    data = copy.deepcopy(small)
    change(data)
    with pytest.raises(BenchmarkError, match="damaged") as caught:
        parse_report(json.dumps(data), "r.json")
    assert place in str(caught.value)


def test_a_cosine_that_is_no_number_is_shown(small):
    for value in (float("nan"), None):
        data = copy.deepcopy(small)
        data["candidates"][4]["outputs"]["cosine"] = value
        show(parse_report(json.dumps(data), "x"))


def show(report):
    show_report(visible(report))
    to_markdown(report).encode()
    to_html(report).encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@LIMITED
@given(JSON, st.sampled_from([None, 1, 2]))
def test_any_json_is_a_report_or_an_error(value, version):
    if isinstance(value, dict) and version is not None:
        value = value | {"schema_version": version, "candidates": [value]}
    try:
        report = parse_report(json.dumps(value), "fuzz.json")
    except DeploykitError as exc:
        assert "fuzz.json" in str(exc)
    else:
        pytest.fail(f"{report} came out of {value}")


def leaves(value, path=()):
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
        if path:
            yield path
    elif isinstance(value, list):
        for n in range(min(len(value), 3)):
            yield from leaves(value[n], (*path, n))
        yield path
    else:
        yield path


@LIMITED
@given(st.data())
def test_a_report_with_one_spoiled_value_is_shown_or_refused(small, data):
    """No mutation of one value gets past the reader and breaks a view."""
    spoiled = copy.deepcopy(small)
    path = data.draw(st.sampled_from(list(leaves(spoiled))))
    value = data.draw(JSON)
    place = spoiled
    for key in path[:-1]:
        place = place[key]
    if data.draw(st.booleans()):
        place[path[-1]] = value
    else:
        del place[path[-1]]
    try:
        report = parse_report(json.dumps(spoiled), "fuzz.json")
    except DeploykitError:
        return
    show(report)


def test_the_schema_is_draft_2020_12_and_versioned(small):
    schema = report_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["properties"]["schema_version"]["enum"] == [1, 2]
    assert {"candidates", "environment", "settings", "winner", "noise_floor"} <= set(schema["required"])
    # Every reference leads somewhere.
    text = json.dumps(schema)
    names = {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert names <= set(schema["$defs"])
    assert what_is_wrong(small) is None


def test_the_thinned_copy_is_a_report_with_the_same_medians(report_data):
    full = Report(report_data.make_report())
    copied = parse_report(json.dumps(thinned(full), allow_nan=False), "x")
    for a, b in zip(full.candidates, copied.candidates, strict=True):
        for r, s in zip(a.get("rounds", []), b.get("rounds", []), strict=True):
            assert len(s["samples_ns"]) == 101 < len(r["samples_ns"]) == s["samples"]
            assert set(s["samples_ns"]) <= set(r["samples_ns"])
            assert np.median(s["samples_ns"]) == pytest.approx(np.median(r["samples_ns"]), rel=0.01)
    assert "thinned" in copied.data
    assert "thinned" not in full.data
