"""Small models, short rounds: what is measured of whom, what is kept, and what is refused. No test asserts on time."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.benchmarks import Candidate, Settings, measure
from deploykit.benchmarks.journal import Journal
from deploykit.benchmarks.process import ChildError, Process
from deploykit.benchmarks.report import table
from deploykit.benchmarks.wording import summary
from deploykit.errors import BenchmarkError
from deploykit.progress import Progress

FEEDS = [{"x": np.random.default_rng(seed).standard_normal((1, 8), np.float32)} for seed in range(4)]
SHORT = Settings(rounds=3, seconds=0.02, warmup_s=0.0)


def write(path, scale=1.0):
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32) * scale
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write(folder / f"{name}.onnx", scale) for name, scale in (("a", 1), ("b", 1), ("wrong", -1))}


def candidate(models, name, device="ort:cpu", **rest):
    return Candidate(name, str(models[name]), device, f"sha-{name}", 100, **rest)


def check_round(found, entries):
    assert len(found["samples_ns"]) == sum(found["block_sizes"]) > 0
    assert sum(found["block_wall_ns"]) == found["wall_ns"] > 0
    assert 0 <= found["position"] < entries
    assert found["peak_memory_bytes"] > 1e6


@pytest.fixture(scope="module")
def confirmed(models, tmp_path_factory):
    """A report of three that are right, one that is wrong and one that cannot run; the best are measured anew."""
    broken = tmp_path_factory.mktemp("broken") / "broken.onnx"
    broken.write_bytes(b"no model")
    entries = [candidate(models, "a"), candidate(models, "b"), replace(candidate(models, "b"), name="c")]
    entries += [candidate(models, "wrong"), Candidate("broken", str(broken), "ort:cpu", "x", 1)]
    told = Progress()
    return measure(entries, FEEDS, replace(SHORT, confirm=True), progress=told), told.notes


def test_wrong_outputs_are_not_timed_and_the_others_are_in_every_round(confirmed):
    report, notes = confirmed
    *right, wrong, broken = report.candidates
    assert report.data["schema_version"] == 2
    assert len(right) == 3
    for entry in right:
        assert entry["status"] == "ok"
        assert [r["round"] for r in entry["rounds"]] == [0, 1, 2]
        for found in entry["rounds"]:
            check_round(found, 4)
    for places in zip(*(e["rounds"] for e in right), report.data["reference_again"], strict=True):
        assert sorted(r["position"] for r in places) == [0, 1, 2, 3]
    assert wrong["status"].startswith("wrong outputs")
    assert broken["status"].startswith("failed:")
    for entry in (wrong, broken):
        assert "rounds" not in entry
        assert "rounds_again" not in entry
    assert any("wrong on ort:cpu does not enter" in note for note in notes)
    assert right[1]["outputs"]["kind"] == "equal"
    assert report.winner["verdict"] in ("tie", "winner")
    assert not any("wrong" in label for label in report.winner["candidates"])
    header, rows = table(report)
    assert len(rows) == 5
    assert "placed" in header
    assert rows[0][header.index("placed")] == "100%/100%"
    assert report.headline() in summary(report)
    spoilt = copy.deepcopy(report)
    spoilt.data["candidates"][3]["outputs"]["cosine"] = float("nan")
    assert json.loads(spoilt.to_json(), parse_constant=pytest.fail)["candidates"][3]["outputs"]["cosine"] is None
    assert table(spoilt)[1][3][header.index("outputs")] == "no cosine"


def test_the_best_three_are_measured_anew(confirmed):
    report, _ = confirmed
    anew = report.winner["measured_again"]
    assert len(anew) == 3
    assert set(report.winner["candidates"]) <= set(anew)
    right = report.candidates[:3]
    for rounds in (*(entry["rounds_again"] for entry in right), report.data["reference_again_anew"]):
        assert [r["round"] for r in rounds] == [3, 4, 5]
    assert report.data["noise_floor_again"] >= 0.01


def test_offline_sweeps_the_requests_in_flight(models):
    settings = replace(SHORT, scenario="offline")
    report = measure([candidate(models, "a"), candidate(models, "a", "openvino:cpu")], FEEDS, settings)
    for entry in report.candidates:
        counts = [point["concurrency"] for point in entry["sweep"]]
        assert counts[0] == 1
        assert len(counts) > 1
        assert entry["knee"] in entry["sweep"]
        assert entry["concurrency"] == entry["knee"]["concurrency"]
        assert all(r["concurrency"] == entry["concurrency"] for r in entry["rounds"])


def test_server_finds_a_rate_for_a_lax_objective_and_none_for_a_strict_one(models):
    settings = replace(SHORT, scenario="server", slo_p99_ms=1000.0, concurrency=1)
    entry = measure([candidate(models, "a")], FEEDS, settings).candidates[0]
    assert entry["status"] == "ok"
    assert entry["highest_rate_per_s"] > 0
    assert any(t["met"] for t in entry["rates"])
    assert all(t["queries"] >= 662 for t in entry["rates"] if t["met"])
    with pytest.raises(BenchmarkError, match="the reference a on ort:cpu: no rate keeps its p99 within 1e-06 ms"):
        measure([candidate(models, "a")], FEEDS, replace(settings, slo_p99_ms=1e-6))


class Interrupting(Progress):
    """Ctrl-C while a round runs."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def advance(self, done, total, unit):
        if unit == "runs" and done >= self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def interrupted(models, tmp_path_factory):
    """What is measured, and the journal of its first round."""
    entries, settings = [candidate(models, "a"), candidate(models, "b")], replace(SHORT, rounds=4)
    journal = tmp_path_factory.mktemp("interrupted") / "r.json.partial"
    with pytest.raises(KeyboardInterrupt):
        measure(entries, FEEDS, settings, progress=Interrupting(4), journal=journal)
    return entries, settings, journal


def test_an_interrupt_keeps_the_rounds_and_a_resumed_run_is_whole(interrupted, tmp_path):
    entries, settings, first = interrupted
    journal = tmp_path / "r.json.partial"
    shutil.copy(first, journal)
    kept = json.loads(journal.read_text())["entries"]
    assert [len(e["rounds"]) for e in kept] == [1, 1, 1]

    report = measure(entries, FEEDS, settings, progress=Interrupting(10), journal=journal, resume=True)
    assert report.interrupted
    assert [len(c["rounds"]) for c in report.candidates] == [3, 3]
    assert journal.exists()

    told = Progress()
    report = measure(entries, FEEDS, settings, progress=told, journal=journal, resume=True)
    assert not report.interrupted
    assert report.winner["measured_again"] == []
    # It goes when the report is written, which is not done here: what was measured is never in memory only.
    assert journal.exists()
    assert any("3 of 4 rounds were there already" in note for note in told.notes)
    for found, before in zip(report.candidates, kept, strict=False):
        assert [r["round"] for r in found["rounds"]] == [0, 1, 2, 3]
        assert found["rounds"][0]["samples_ns"] == before["rounds"][0]["samples_ns"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c, f, s: ([replace(c[0], sha256="other"), c[1]], f, s), "candidates"),
        (lambda c, f, s: (c, [{"x": f[0]["x"] + 1}], s), "inputs"),
        (lambda c, f, s: (c, f, replace(s, seconds=0.03)), "settings"),
    ],
)
def test_a_journal_of_another_measurement_is_refused(interrupted, change, said):
    entries, settings, journal = interrupted
    changed, feeds, settings = change(entries, FEEDS, settings)
    with pytest.raises(BenchmarkError, match=f"another measurement: other {said}"):
        measure(changed, feeds, settings, journal=journal, resume=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": {}, "entries": []}', "\udcff"])
def test_a_damaged_journal_is_refused(models, tmp_path, text):
    journal = tmp_path / "j"
    journal.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(BenchmarkError, match=r"cannot read|another measurement"):
        measure([candidate(models, "a")], FEEDS, SHORT, journal=journal, resume=True)


def test_the_journal_lies_beside_the_report(tmp_path):
    assert Journal.beside(tmp_path / "r.json") == tmp_path / "r.json.partial"


def test_a_process_that_dies_is_an_error_with_its_reason(models, tmp_path):
    from deploykit.benchmarks.outputs import write_feeds

    write_feeds(tmp_path / "feeds.npz", FEEDS)
    with Process(candidate(models, "a"), SHORT, tmp_path) as child:
        child._child.kill()
        with pytest.raises(ChildError, match="signal 9"):
            child.ask("time", seconds=0.01)
    with pytest.raises(ChildError, match="does not exist"):
        Process(replace(candidate(models, "a"), path=str(tmp_path / "none.onnx")), SHORT, tmp_path)


def test_a_reference_that_cannot_run_is_an_error(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(BenchmarkError, match="the reference"):
        measure([Candidate("broken", str(broken), "ort:cpu", "x", 1)], FEEDS, SHORT)


def test_settings_of_a_candidate_and_requests_in_flight_reach_the_runtime(models):
    tuned = candidate(
        models, "a", threads=1, optimize="extended", settings={"session.intra_op.allow_spinning": "0"}, tuned=True
    )
    entry = measure([tuned], FEEDS, replace(SHORT, scenario="offline", concurrency=3)).candidates[0]
    assert entry["settings"]["session.intra_op.allow_spinning"] == "0"
    assert entry["tuned"]["threads"] == 1
    assert entry["concurrency"] == 3
    assert all(r["concurrency"] == 3 for r in entry["rounds"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scenario": "other"}, "unknown scenario"),
        ({"scenario": "server"}, "needs an objective"),
        ({"slo_p99_ms": 5.0}, "objective of 5.0 ms in the scenario latency"),
        ({"scenario": "server", "slo_p99_ms": float("nan")}, "objective of nan"),
        ({"concurrency": 2}, "2 requests in flight in the scenario latency"),
        ({"scenario": "offline", "concurrency": 0}, "0 requests"),
        ({"rounds": 2}, "2 rounds"),
    ],
)
def test_settings_that_give_no_result_are_refused(models, change, said):
    with pytest.raises(BenchmarkError, match=said):
        measure([candidate(models, "a")], FEEDS, replace(SHORT, **change))
