"""The search's decisions, with an executor that answers as it is told: no model runs here."""

from __future__ import annotations

import json
import tempfile
import threading
import tomllib
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.artifact import Artifact, Evidence, StepRecord
from deploykit.errors import BenchmarkError, DataError, JobTimeoutError, OptimizationError, SearchError
from deploykit.goals import Goal
from deploykit.progress import Progress
from deploykit.schemes import SCHEMES
from deploykit.search.crew import NOT_TRIED
from deploykit.search.deeds import judge
from deploykit.search.document import Outcome, fleet_front, fleet_outcomes, machine_rows
from deploykit.search.engine import Search
from deploykit.search.fleet import stop
from deploykit.search.graphs import facts_of
from deploykit.search.jobs import Done, Job
from deploykit.search.machines import LOCAL, Node, machine_of
from deploykit.search.schema import what_is_wrong
from deploykit.search.shards import STATE
from deploykit.search.so_far import read_so_far, teller
from deploykit.search.timing import Cost, plan
from deploykit.search.wish import Limits, Wish
from deploykit.search.wording import ratio_text
from deploykit.specs import Signature, TensorSpec
from deploykit.staging import ArtifactWriter

STATIC = "static on ort:cpu"
OTHERS = ("fuse-transformers", "fuse-onnxscript", "export-torchscript", "simplify")


def write_artifact(place: Path, weight: float, *, quantized: bool = False) -> Artifact:
    """One product; `weight` makes it another model."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    if quantized:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s"], ["d"]),
            helper.make_node("MatMul", ["d", "w"], ["y"]),
        ]  # fmt: skip
    info = helper.make_tensor_value_info
    weights = [
        numpy_helper.from_array(np.full((2, 2), weight, np.float32), "w"),
        numpy_helper.from_array(np.float32(1), "s"),
    ]
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, ["n", 2])], [info("y", TensorProto.FLOAT, ["n", 2])], weights
    )
    with ArtifactWriter(place) as writer:
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), str(writer.dir / "model.onnx"))
        x, y = (TensorSpec(name, "float32", ("n", 2)) for name in "xy")
        record = StepRecord(step="export", params={}, tools={}, parent=None, seconds=0.0)
        return writer.commit(model="model.onnx", signature=Signature((x,), (y,)), lineage=[record], evidence=Evidence())


class Clock:
    """Seconds that pass as jobs say."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Scripted:
    """Answers jobs out of tables, and keeps what it was asked."""

    slots = 1
    nodes: tuple[Node, ...] = ()

    def __init__(self, clock: Clock, **tables: Any) -> None:
        self.clock = clock
        self.asked: list[Job] = []
        self.size: dict[str, int] = tables.get("size", {})
        self.quality: dict[str, dict[str, Any]] = tables.get("quality", {})
        self.speed: dict[str, float] = tables.get("speed", {})
        self.fails: dict[str, Exception] = tables.get("fails", {})
        self.wrong: dict[str, str] = tables.get("wrong", {})
        self.tuned: dict[str, Any] = tables.get("tuned", {})
        self.ties: list[str] | None = tables.get("ties")
        self.takes: dict[str, float] = tables.get("takes", {})
        self.nodes = tables.get("nodes", ())
        self.speed_on: dict[str, dict[str, float]] = tables.get("speed_on", {})
        self._guard = threading.Lock()
        self.unjudged: set[str] = tables.get("unjudged", set())
        self.runs_not: set[str] = tables.get("runs_not", set())
        self.interrupt: str = tables.get("interrupt", "")
        self.decided: dict[str, float] = tables.get("decided", {})
        self.spends: bool = tables.get("spends", False)
        self.memory: int | None = tables.get("memory", 10**8)
        self.last_memory: dict[str, int] = tables.get("last_memory", {})
        self.fails_last: set[str] = tables.get("fails_last", set())
        self.load_s: float = tables.get("load_s", 0.2)
        self.hangs: set[str] = tables.get("hangs", set())
        self.hold: tuple[str, threading.Event] | None = tables.get("hold")

    def submit(self, job: Job, folder: Path) -> Future[Done]:
        if self.hold is not None and job.node == self.hold[0]:
            self.hold[1].wait(30)
        with self._guard:  # other machines' jobs come from threads of their own
            return self._answer(job, folder)

    def _answer(self, job: Job, folder: Path) -> Future[Done]:
        self._now_on = job.node
        self.asked.append(job)
        deed = job.deed.partition(":")[2]
        future: Future[Done] = Future()
        seconds = self.takes.get(job.label, self.takes.get(deed, 1.0))
        if self.spends:
            seconds = job.params.get("effort", {}).get("budget_s", seconds)
        if job.timeout_s is not None and seconds > job.timeout_s and self.spends:
            self.clock.now += job.timeout_s
            future.set_exception(JobTimeoutError(f"{job.label} took longer than {job.timeout_s} s and was ended"))
            return future
        self.clock.now += seconds
        try:
            value = getattr(self, f"_{deed}")(job, folder)
        except (OptimizationError, BenchmarkError, JobTimeoutError, RuntimeError) as exc:
            future.set_exception(exc)
        else:
            future.set_result(Done(value, folder, 1.0))
        return future

    def machines(self) -> tuple[Node, ...]:
        return self.nodes or (Node(LOCAL, 1, machine_of()),)

    def names(self, deed: str) -> list[str]:
        return [j.params.get("name", j.label) for j in self.asked if j.deed.endswith(f":{deed}")]

    def _make(self, job: Job, folder: Path) -> dict[str, Any]:
        name = job.params["name"]
        if name in self.fails:
            raise self.fails[name]
        if name == self.interrupt:
            raise KeyboardInterrupt
        step = job.params["table"].get("step", "export")
        weight = 1.0 + sum(name.encode())
        made = write_artifact(folder / "a", weight, quantized=step.startswith("quantize") and "half" not in step)
        size = {"size_bytes": self.size.get(name, 1000)}
        likeness = {} if step in ("export", "simplify") else {"likeness": name}
        return {"artifact": "a", **facts_of(made), **size, **likeness}

    def _calibrate_shard(self, job: Job, folder: Path) -> dict[str, Any]:
        (folder / STATE).write_text(job.label)
        return {"samples": 1, "tensors": 1}

    def _merge_states(self, job: Job, folder: Path) -> dict[str, Any]:
        (folder / STATE).write_text(" ".join(sorted(p.read_text() for p in job.inputs.values())))
        return {"samples": 2, "tensors": 1}

    def _judge(self, job: Job, folder: Path) -> dict[str, Any]:
        fine = {"summary": "fine", "met": True, "collapsed": "", "sqnr_db": 40.0, "agreement": 1.0}
        found = {}
        tell = teller(job.params["effort"]["so_far"])
        for name, precision in job.params["seats"]:
            tell({"began": f"{name}/{precision}"})
            if name in self.hangs:
                self.clock.now += job.stall_s or 0.0
                raise JobTimeoutError(f"{job.label} said nothing for {job.stall_s} s and was ended")
            quality = self.quality.get(f"{name} on {job.params['device']}", self.quality.get(name, fine))
            found[f"{name}/{precision}"] = {"quality": {**fine, **quality}}
            if name in self.unjudged:
                found[f"{name}/{precision}"] = {"error": NOT_TRIED}
            tell({"judged": f"{name}/{precision}", "entry": found[f"{name}/{precision}"]})
        return {"found": found}

    def _entry(self, seat: dict[str, Any]) -> dict[str, Any]:
        label = f"{seat['label']} on {seat['device']}"
        ratio = self.speed_on.get(self._now_on or "", self.speed).get(label, 1.0)
        entry = {"status": "ok", "turns": 4, "peak_memory_bytes": self.memory, "outputs": None, "load_s": self.load_s}
        if label in self.wrong:
            return entry | {"status": self.wrong[label]}
        return entry | {"ratio": ratio, "low": ratio * 0.99, "high": ratio * 1.01, "pace_ms": 1 / ratio}

    def _screen(self, job: Job, folder: Path) -> dict[str, Any]:
        if self.interrupt == "screen" and (self.hold is None or job.node != self.hold[0]):
            raise KeyboardInterrupt
        if job.params["seats"][0]["device"] in self.runs_not:
            raise BenchmarkError("the reference does not run")
        return {"found": [self._entry(s) for s in job.params["seats"]]}

    def _tune(self, job: Job, folder: Path) -> dict[str, Any]:
        (seat,) = job.params["seats"]
        config = {
            "threads": seat["threads"], "sessions": 1, "concurrency": 1, "batch": 1, "precision": seat["precision"],
            "optimize": True, "settings": {},
        }  # fmt: skip
        batches = (1, 8) if job.params["batches"] else ()
        trials = [{"stage": "batch", "batch": n, "throughput_per_s": 100.0 + 10 * n} for n in batches]
        return {"chosen": config | self.tuned.get(seat["label"], {}), "trials": trials}

    def _decide(self, job: Job, folder: Path) -> dict[str, Any]:
        labels = [f"{s['label']} on {s['device']}" for s in job.params["seats"]]
        found = [self._entry(s) for s in job.params["seats"]]
        names, broken = list(labels), [n for n, label in enumerate(labels) if label in self.fails_last]
        found = [e for n, e in enumerate(found) if n not in broken]
        labels = [label for n, label in enumerate(labels) if n not in broken]
        for label, entry in zip(labels, found, strict=True):
            entry["ratio"] = ratio = self.decided.get(label, entry["ratio"])
            entry |= {"low": ratio * 0.99, "high": ratio * 1.01}
        candidates = []
        for label, entry in zip(labels, found, strict=True):
            against = {"verdict": "faster", "ratio": entry["ratio"], "low": entry["low"], "high": entry["high"]}
            candidates.append({
                "name": label, "status": "ok", "median_ms": entry["pace_ms"], "p90_ms": None, "p99_ms": None,
                "throughput_per_s": 1.0, "peak_memory_bytes": self.last_memory.get(label, self.memory),
                "against_reference": against,
            })  # fmt: skip
        for number in broken:
            candidates.insert(number, {"name": names[number], "status": "failed: it died"})
        best = max(zip(labels, found, strict=True), key=lambda pair: pair[1]["ratio"])[0]
        return {"report": {"candidates": candidates, "winner": {"candidates": self.ties or [best]}}}

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Search with a scripted executor; gives the outcome and the executor."""

    def go(*, wish: dict[str, Any] | None = None, **tables: Any) -> tuple[Outcome, Scripted, Search]:
        clock = Clock()
        executor = Scripted(clock, **tables)
        data = tmp_path / "data.npz"
        if not data.exists():
            np.savez(data, x=np.zeros((4, 2), np.float32))
        asked: dict[str, Any] = {
            "source": "net.py:make", "data": str(data), "devices": ("ort:cpu", "openvino:cpu"), "budget_s": 100.0,
            "goal": Goal(min_agreement=0.9), "native": False,
        }  # fmt: skip

        def scratch() -> Path:
            return Path(tempfile.mkdtemp(dir=tmp_path))

        search = Search(Wish(**{**asked, **(wish or {})}), executor, scratch, Progress(), clock=clock)
        state = "done"
        try:
            search.go()
        except KeyboardInterrupt:
            state = "interrupted"
        return Outcome(search, state), executor, search

    return go


def dropped(search: Search, label: str) -> str:
    """Phase and reason of a seat."""
    found = next(s for s in search.seats if s.place.label == label).dropped
    return f"{found['phase']}: {found['reason']}" if found else ""


def test_the_fastest_that_keeps_the_target_wins_and_the_document_says_why_the_others_did_not(run: Any) -> None:
    outcome, _, search = run(speed={STATIC: 2.0, "dynamic on ort:cpu": 1.5, "fp16 on ort:cpu": 0.5})
    assert outcome.winner.place.label == STATIC
    assert "winner: static on ort:cpu, 2.00x [1.98, 2.02] as fast as export on ort:cpu" in outcome.headline
    assert dropped(search, "dynamic on ort:cpu").startswith("decide: slower: 1.50x the reference, the winner 2.00x")
    document = outcome.document(search)
    json.dumps(document)
    assert document["winner_seat"] == STATIC
    assert [p["name"] for p in document["phases"]] == [
        "export", "graphs", "make", "judge", "screen", "mend", "tune", "decide",
    ]  # fmt: skip
    by_name = {t["name"]: t for t in document["tried"]}
    assert by_name["simplify"]["dropped"]["reason"] == "the same graph as export"
    assert by_name["static"]["status"] == "kept"
    assert [s["step"] for s in by_name["static"]["steps"]] == ["export", "quantize-static"]


def test_what_misses_the_target_is_not_kept_but_mended_where_it_is_faster(run: Any) -> None:
    missed = {"met": False, "summary": "agreement 0.5"}
    outcome, executor, search = run(
        quality={"static": missed}, speed={STATIC: 2.0, "static-mixed on ort:cpu": 1.8, "dynamic on ort:cpu": 1.2}
    )
    assert dropped(search, STATIC) == "judge: too inaccurate: agreement 0.5"
    assert outcome.winner.place.label == "static-mixed on ort:cpu"
    made = next(j for j in executor.asked if j.params.get("name") == "static-mixed")
    assert made.params["table"]["min_agreement"] == 0.9


def test_nothing_is_mended_that_would_not_win(run: Any) -> None:
    missed = {"met": False, "summary": "agreement 0.5"}
    outcome, executor, _ = run(quality={"static": missed}, speed={STATIC: 1.1, "dynamic on ort:cpu": 1.2})
    assert "static-mixed" not in executor.names("make")
    assert outcome.winner.place.label == "dynamic on ort:cpu"


def test_for_size_the_smaller_is_mended_also_where_it_is_slow(run: Any) -> None:
    outcome, _, _ = run(
        wish={"objective": "size"}, quality={"weights4": {"met": False, "summary": "agreement 0.5"}},
        size={"weights4": 300, "weights4-mixed": 350, "weights8": 500}, speed={"weights4 on ort:cpu": 0.3},
    )  # fmt: skip
    assert outcome.winner.place.model == "weights4-mixed"


def test_a_model_that_collapsed_is_wrong_also_where_no_target_was_given(run: Any) -> None:
    collapsed = {"met": False, "collapsed": "it collapsed", "summary": "it collapsed"}
    outcome, _, search = run(wish={"goal": Goal()}, quality={"static": collapsed}, speed={STATIC: 9.0})
    assert dropped(search, STATIC) == "judge: wrong: it collapsed"
    assert outcome.winner.place.model != "static"


def test_without_an_answer_of_the_judge_nothing_quantized_is_kept(run: Any) -> None:
    outcome, _, search = run(takes={"export": 100.0}, speed={STATIC: 9.0})
    assert outcome.winner.place.label == "export on ort:cpu"
    assert search.variants["static"].dropped == {"phase": "make", "reason": "not tried: the budget is too small"}
    assert any("did not reach a last measurement" in n for n in search.told.notes) or search.timing.report is None


def test_wrong_outputs_failures_and_crashes_are_recorded_and_harm_nobody_else(run: Any) -> None:
    outcome, _, search = run(
        fails={"dynamic": OptimizationError("nothing to quantize"), "weights8": RuntimeError("Traceback\nKeyError: 1")},
        wrong={"static-auto on ort:cpu": "wrong outputs: cosine 0.1"}, speed={STATIC: 2.0},
    )  # fmt: skip
    assert outcome.winner.place.label == STATIC
    assert search.variants["dynamic"].dropped == {"phase": "make", "reason": "nothing to quantize"}
    assert search.variants["weights8"].dropped == {"phase": "make", "reason": "it crashed: KeyError: 1"}
    assert dropped(search, "static-auto on ort:cpu") == "screen: wrong outputs: cosine 0.1"
    assert {f["label"] for f in search.failures} >= {"dynamic", "weights8"}
    assert any("weights8 crashed; please report it" in note for note in search.told.notes)


def test_among_those_that_tie_float_is_kept_before_integers_and_the_smaller_before_the_larger(run: Any) -> None:
    speed = {STATIC: 1.5, "fp16 on ort:cpu": 1.5, "static-auto on ort:cpu": 1.5}
    labels = [STATIC, "fp16 on ort:cpu", "static-auto on ort:cpu"]
    outcome, _, _ = run(speed=speed, ties=labels)
    assert outcome.winner.place.label == "fp16 on ort:cpu"
    assert outcome.headline.startswith("winner: fp16 on ort:cpu, 1.50x")
    # One of those that tie seems the fastest by the order of names only, and it is that one's integers that count.
    assert "; tie with static on ort:cpu, static-auto on ort:cpu, and " in outcome.headline
    outcome, _, _ = run(
        speed={STATIC: 1.5, "static-auto on ort:cpu": 1.5}, size={"static": 900, "static-auto": 500},
        ties=[STATIC, "static-auto on ort:cpu"],
    )  # fmt: skip
    assert outcome.winner.place.label == "static-auto on ort:cpu"


def test_a_tie_for_want_of_evidence_is_not_kept_where_it_seems_slower(run: Any) -> None:
    speed = {STATIC: 1.5, "fp16 on ort:cpu": 1.3, "static-auto on ort:cpu": 1.46}
    outcome, _, _ = run(speed=speed, ties=[*speed], size={"static": 900, "static-auto": 500, "fp16": 100})
    assert outcome.winner.place.label == "static-auto on ort:cpu"
    assert ", and chosen for its size; " in outcome.headline
    assert {s.place.label for s in outcome.tied} == {*speed}
    # But the exported model may stay, where nothing is certain to be faster.
    outcome, _, _ = run(speed={STATIC: 1.5}, ties=[STATIC, "export on ort:cpu"])
    assert outcome.winner.place.label == "export on ort:cpu"
    said = "kept: export on ort:cpu, the exported model as it is: nothing that is right was surely faster; tie with"
    assert outcome.headline.startswith(f"{said} static on ort:cpu; ")


QUIET = {"export": {"settings": {"session.intra_op.allow_spinning": "0"}}}


def test_settings_that_fail_at_last_do_not_take_the_exported_model_with_them(run: Any) -> None:
    slow = {f"{n} on {d}": 0.5 for n in (*SCHEMES, *OTHERS) for d in ("ort:cpu", "openvino:cpu")}
    slow["export on openvino:cpu"] = 0.5
    outcome, _, _ = run(speed=slow, tuned=QUIET, fails_last={"export tuned on ort:cpu"})
    assert outcome.winner.place.label == "export on ort:cpu"
    assert outcome.winner.best_place.label == "export on ort:cpu"
    assert outcome.settings_of(outcome.winner).settings == {}


def test_a_limit_holds_for_the_exported_model_also_where_other_settings_did_not_help(run: Any) -> None:
    slow = {f"{n} on {d}": 0.5 for n in (*SCHEMES, *OTHERS) for d in ("ort:cpu", "openvino:cpu")}
    slow |= {"export on openvino:cpu": 0.5, STATIC: 0.7, "export tuned on ort:cpu": 0.9}
    limits = Limits(max_memory_mb=150.0)
    outcome, _, search = run(
        wish={"limits": limits}, speed=slow, tuned=QUIET, last_memory={"export on ort:cpu": 2 * 10**8}
    )  # fmt: skip
    assert dropped(search, "export on ort:cpu") == "limits: 200 MB of memory, more than 150"
    assert outcome.winner.place.label != "export on ort:cpu"


def test_what_was_only_screened_does_not_go_before_what_was_measured_to_the_end(run: Any) -> None:
    """Of many, some seem fast in a few turns; the last measurement takes three of them."""
    speed = {STATIC: 2.2, "static-auto on ort:cpu": 2.15, "dynamic on ort:cpu": 2.1, "fp16 on ort:cpu": 2.05}
    outcome, _, search = run(
        speed=speed, decided={STATIC: 1.8, "static-auto on ort:cpu": 1.6, "dynamic on ort:cpu": 1.5}
    )
    assert outcome.winner.place.label == STATIC
    assert "winner: static on ort:cpu, 1.80x" in outcome.headline
    reason = "slower in the screening than what was measured to the end: 2.05x the reference there"
    seat = next(s for s in search.seats if s.place.label == "fp16 on ort:cpu")
    assert [e["name"] for e in outcome.document(search)["front"] if e["why"] == "fastest"] == ["static"]
    assert seat.status == "front" or dropped(search, "fp16 on ort:cpu") == f"screen: {reason}"


def test_a_winner_that_was_there_before_is_kept_and_not_found(run: Any) -> None:
    outcome, _, search = run(wish={"objective": "throughput"}, speed={STATIC: 2.0}, tuned={"static": {"batch": 1}})
    assert any(n.startswith("batch 1 kept: no other was worth it; samples a second") for n in search.told.notes)
    assert outcome.headline.startswith("winner: ")
    outcome, _, search = run(wish={"objective": "size"}, size={"static": 400})
    assert dropped(search, "export on ort:cpu") in ("decide: the winner is smaller", "screen: the winner is smaller")


def test_limits_exclude(run: Any) -> None:
    outcome, _, search = run(
        wish={"limits": Limits(max_size_mb=0.0009)}, size={"static": 2000, "dynamic": 500},
        speed={STATIC: 2.0, "dynamic on ort:cpu": 1.2},
    )  # fmt: skip
    assert outcome.winner.place.label == "dynamic on ort:cpu"
    assert search.variants["static"].dropped == {"phase": "limits", "reason": "0.00 MB, more than 0.0009"}
    outcome, _, search = run(wish={"limits": Limits(max_latency_ms=0.6)}, speed={STATIC: 2.0})
    assert outcome.winner.place.label == STATIC
    with pytest.raises(SearchError, match=r"nothing keeps what was asked for: .* ms, more than 0\.1"):
        run(wish={"limits": Limits(max_latency_ms=0.1)}, speed={STATIC: 2.0})


def test_a_limit_on_memory_is_not_kept_where_memory_is_not_known(run: Any) -> None:
    with pytest.raises(SearchError, match="what memory it takes is not known here, and at most 150 MB of memory was"):
        run(wish={"limits": Limits(max_memory_mb=150.0)}, memory=None)
    outcome, _, _ = run(wish={"limits": Limits(max_size_mb=1.0)}, memory=None, speed={STATIC: 2.0})
    assert outcome.winner.place.label == STATIC


def test_the_smallest_wins_where_size_is_the_objective(run: Any) -> None:
    outcome, executor, _ = run(
        wish={"objective": "size"}, size={"static": 400, "weights4": 300}, speed={STATIC: 2.0}
    )  # fmt: skip
    assert outcome.winner.place.model == "weights4"
    assert not executor.names("tune")


def test_cost_counts_the_cores_that_are_kept_busy(run: Any) -> None:
    outcome, _, _ = run(wish={"objective": "cost"}, speed={STATIC: 2.0}, tuned={"static": {"threads": 1}})
    assert outcome.winner.place.label == STATIC
    assert outcome.winner.best_place.cores == 1


@pytest.mark.parametrize("objective", ["throughput", "cost"])
def test_the_samples_of_a_request_are_found_out_and_the_same_for_all(run: Any, objective: str) -> None:
    outcome, executor, search = run(
        wish={"objective": objective}, speed={STATIC: 2.0, "static tuned on ort:cpu": 3.0, "dynamic on ort:cpu": 1.5},
        tuned={"static": {"batch": 8}, "dynamic": {"batch": 8}},
    )  # fmt: skip
    first, *others = [j for j in executor.asked if j.deed.endswith(":tune")]
    assert (first.params["batches"], first.params["settings"]["batch"]) == (True, 1)
    assert others
    assert {(j.params["batches"], j.params["settings"]["batch"]) for j in others} == {(False, 8)}
    (decide,) = [j for j in executor.asked if j.deed.endswith(":decide")]
    assert decide.params["settings"]["batch"] == 8
    assert outcome.settings_of(outcome.winner).batch == 8
    assert next(s for s in search.seats if s.reference).best_place.config.batch == 8
    assert "batch 8 chosen; samples a second against batch 1: 8 1.64x" in search.told.notes


@pytest.mark.parametrize("wish", [{"objective": "latency"}, {"objective": "throughput", "batch": 4}])
def test_the_samples_of_a_request_stay_what_they_are(run: Any, wish: dict[str, Any]) -> None:
    _, executor, _ = run(wish=wish, speed={STATIC: 2.0})
    timed = [j for j in executor.asked if "settings" in j.params]
    assert {j.params["settings"]["batch"] for j in timed} == {wish.get("batch", 1)}
    assert not any(j.params.get("batches") for j in timed)


def test_found_settings_are_measured_in_the_end_and_handed_over(run: Any) -> None:
    outcome, _, _ = run(
        speed={STATIC: 2.0, "static tuned on ort:cpu": 2.5},
        tuned={"static": {"settings": {"session.intra_op.allow_spinning": "0"}}},
    )  # fmt: skip
    assert outcome.winner.best_place.label == "static tuned on ort:cpu"
    settings = outcome.settings_of(outcome.winner)
    assert settings.settings == {"session.intra_op.allow_spinning": "0"}
    assert "2.50x" in outcome.headline


def test_the_exported_model_wins_where_nothing_is_faster(run: Any) -> None:
    slow = {f"{n} on ort:cpu": 0.5 for n in ("static", "dynamic", "static-auto", "fp16", "weights8", "weights4")}
    slow |= {label.replace("ort", "openvino"): ratio for label, ratio in slow.items()}
    slow |= {"static-nncf on ort:cpu": 0.5, "static-nncf on openvino:cpu": 0.5, "export on openvino:cpu": 0.6}
    others = ("fuse-transformers", "fuse-onnxscript", "export-torchscript", "simplify")
    slow |= {f"{n} on {d}": 0.5 for n in others for d in ("ort:cpu", "openvino:cpu")}
    outcome, _, _ = run(speed=slow)
    assert outcome.winner.place.label == "export on ort:cpu"
    assert "the exported model as it is: nothing that is right was faster" in outcome.headline


def test_the_budget_ends_the_search_at_each_phase(run: Any) -> None:
    for slow in ("make", "judge", "screen", "tune", "decide"):
        outcome, _, search = run(takes={slow: 60.0, "export": 1.0}, speed={STATIC: 2.0})
        assert outcome.winner is not None, slow
        assert search.phases[-1].name == "decide"


@pytest.mark.parametrize("hangs", [set(), {"dynamic", "weights8"}, {"static", "fp16", "dynamic"}])
@pytest.mark.parametrize("makes", [2.0, 1e6])
def test_the_budget_is_kept_where_everything_takes_all_that_it_may(run: Any, hangs: set[str], makes: float) -> None:
    missed = {"met": False, "summary": "agreement 0.5"}
    for budget_s in (60.0, 200.0, 1000.0):
        _, _, search = run(
            wish={"budget_s": budget_s}, spends=True, hangs=hangs, takes={"make": makes, "export": 1.0},
            speed={STATIC: 2.0, "weights4 on ort:cpu": 3.0}, quality={"weights4": missed},
        )  # fmt: skip
        assert search.spent_s() <= 1.1 * budget_s


def test_the_recipe_holds_the_winners_steps(run: Any) -> None:
    outcome, _, _ = run(speed={STATIC: 2.0})
    text = outcome.recipe(outcome.search)
    assert "[export]" in text and '[static]\nstep = "quantize-static"' in text
    assert "dynamic" not in text.replace("dynamic =", "")
    assert "check_rows" not in text  # who runs it wants to see it judged


@pytest.mark.parametrize("name", ["fp16", "weights8", "weights4"])
def test_what_changes_numbers_is_not_kept_unjudged_whatever_its_operators(run: Any, name: str) -> None:
    """Halves and blocks have no QuantizeLinear, and are no more certified for that."""
    outcome, _, search = run(unjudged={name}, speed={f"{name} on ort:cpu": 9.0})
    assert outcome.winner.place.model != name
    assert dropped(search, f"{name} on ort:cpu") == f"judge: {NOT_TRIED}"


@pytest.mark.parametrize("when", ["simplify", "weights4", "screen"])
@pytest.mark.parametrize("objective", ["latency", "size"])
def test_an_interrupt_keeps_the_exported_model_and_nothing_that_was_never_run(
    run: Any, when: str, objective: str
) -> None:
    outcome, _, _ = run(wish={"objective": objective}, interrupt=when, size={"fp16": 1, "weights8": 2})
    assert outcome.winner.place.label == "export on ort:cpu"
    assert "nothing was measured" in outcome.headline
    assert [s.place.label for s in outcome.front] == ["export on ort:cpu"]
    assert outcome.front and outcome.document(outcome.search)["front"][0]["why"] == "not measured"
    assert (
        what_is_wrong(json.loads(json.dumps({**outcome.document(outcome.search), "schema_version": 1, "wish": WISH})))
        is None
    )


WISH = {"goal": {}, "objective": "latency", "limits": {}, "devices": ["ort:cpu"]}


def test_the_next_device_gives_the_reference_where_the_first_does_not_run_the_model(run: Any) -> None:
    outcome, _, search = run(runs_not={"ort:cpu"}, speed={"static on openvino:cpu": 2.0})
    assert outcome.reference == "export on openvino:cpu"
    assert outcome.winner.place.label == "static on openvino:cpu"
    assert dropped(search, "export on ort:cpu") == "screen: the reference does not run"


def test_a_model_that_runs_nowhere_is_no_winner(run: Any) -> None:
    with pytest.raises(SearchError, match="runs on none of ort:cpu, openvino:cpu: ort:cpu: the reference does not"):
        run(runs_not={"ort:cpu", "openvino:cpu"})


def test_a_limit_on_size_excludes_the_exported_model_too(run: Any) -> None:
    outcome, _, search = run(
        wish={"limits": Limits(max_size_mb=0.0009)}, size={"static": 500}, speed={STATIC: 0.5}
    )  # fmt: skip
    assert outcome.winner.place.label == "static on openvino:cpu"
    assert dropped(search, "export on ort:cpu") == "limits: 0.00 MB, more than 0.0009"
    assert outcome.reference == "export on ort:cpu"


def test_a_model_that_was_given_has_no_steps_and_keeps_the_contract(run: Any, tmp_path: Path) -> None:
    slow = {f"{n} on {d}": 0.5 for n in SCHEMES for d in ("ort:cpu", "openvino:cpu")}
    slow |= {f"{n} on {d}": 0.5 for n in ("fuse-transformers", "fuse-onnxscript") for d in ("ort:cpu", "openvino:cpu")}
    slow["export on openvino:cpu"] = 0.5
    given = write_artifact(tmp_path / "given", 1.0)
    outcome, _, _ = run(wish={"model": str(given.path)}, speed=slow)
    assert outcome.winner.place.label == "export on ort:cpu"
    assert outcome.recipe(outcome.search) is None
    outcome, _, search = run(wish={"model": str(given.path), "contract": ("ort:1.14",)}, speed=slow)
    assert outcome.winner.place.model != "export"
    assert "breaks its target contract" in dropped(search, "export on ort:cpu")


def test_the_recipe_can_be_run_from_anywhere(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").touch()
    (tmp_path / "rows.py").touch()
    np.savez(tmp_path / "eval.npz", x=np.zeros((4, 2), np.float32))
    missed = {"met": False, "summary": "agreement 0.5"}
    outcome, _, _ = run(
        wish={"data": "rows.py:rows", "eval_data": "eval.npz"}, quality={"static": missed},
        speed={STATIC: 3.0, "static-mixed on ort:cpu": 2.0},
    )  # fmt: skip
    tables = tomllib.loads(outcome.recipe(outcome.search))
    assert tables["export"]["source"] == f"{tmp_path}/net.py:make"
    assert tables["static-mixed"]["data"] == f"{tmp_path}/rows.py:rows"
    assert tables["static-mixed"]["eval_data"] == f"{tmp_path}/eval.npz"


def test_what_a_function_gives_is_the_same_within_one_search_only(run: Any, tmp_path: Path) -> None:
    """Its code may read files that no key knows."""
    _, executor, _ = run(wish={"data": "rows:rows"})
    for job in executor.asked:
        assert "data_run" in job.params, job.deed


def test_side_by_side_is_told_from_one_at_a_time(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploykit.search.timing.machine_of", lambda: {**machine_of(), "cores_allowed": 2})
    speed = {"export side by side on ort:cpu": 1.8, "static side by side on ort:cpu": 3.0}
    outcome, executor, search = run(wish={"objective": "throughput", "tune": False}, speed=speed)
    assert outcome.winner.best_place.label == "static side by side on ort:cpu"
    assert outcome.settings_of(outcome.winner).sessions == 2
    (decide,) = [j for j in executor.asked if j.deed.endswith(":decide")]
    labels = [(s["label"], s["device"]) for s in decide.params["seats"]]
    assert len(set(labels)) == len(labels)
    reference = next(s for s in search.seats if s.reference)
    assert reference.ratio == 1.8
    assert reference.best_place.config.sessions == 2


def test_a_way_to_run_that_fails_does_not_hide_one_that_works(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploykit.search.timing.machine_of", lambda: {**machine_of(), "cores_allowed": 2})
    outcome, _, _ = run(
        wish={"objective": "throughput", "tune": False}, speed={STATIC: 2.0},
        wrong={"static side by side on ort:cpu": "failed: no memory"},
    )  # fmt: skip
    assert outcome.winner.best_place.label == STATIC


def test_a_cosine_that_was_asked_for_holds_everywhere(run: Any) -> None:
    _, executor, _ = run(wish={"min_cosine": 0.99})
    made = {j.params["name"]: j.params["table"] for j in executor.asked if j.deed.endswith(":make")}
    assert {made[n]["min_cosine"] for n in ("static", "dynamic", "fp16")} == {0.99}
    assert {j.params["settings"]["min_cosine"] for j in executor.asked if "settings" in j.params} == {0.99}


def test_a_latency_limit_is_refused_where_no_latency_is_measured() -> None:
    for objective in ("throughput", "cost"):
        with pytest.raises(SearchError, match="a latency is not measured"):
            Wish("a.onnx", objective=objective, limits=Limits(max_latency_ms=1.0)).check()


def test_the_last_measurement_fits_into_its_time() -> None:
    for load_s, request_s, lanes in ((0.2, 0.0, 1), (0.5, 0.04, 1), (4.0, 0.01, 1), (1.0, 0.5, 1), (0.5, 0.02, 4)):
        cost, alone = Cost(load_s, request_s, lanes), lanes * request_s
        most = 0
        for left in range(1, 400):
            for by_wall in (False, True):
                count, rounds, seconds = plan(left, [cost] * 4, by_wall)
                # A process runs ten requests and three in every lane before it is timed, or these where it is slow.
                warm = min(max(10 * request_s, 3 * alone), max(1.5, 3 * alone))
                warm = max(warm, min(0.5, seconds))
                # For the profile it is loaded again; throughput takes a sweep: two passes, each warmed up.
                once = 1.0 + 2 * load_s + 20 * alone
                sweep = 2 * (max(0.2, alone) + max(min(0.5, seconds), alone))
                once += warm + sweep if by_wall else 0
                # A block begins with a request that does not count.
                run = 1.0 + load_s + warm + seconds + alone
                assert rounds == 0 or (count + 1) * once + rounds * (count + 2) * run <= left + 1e-9
                assert rounds == 0 or seconds >= (5 if count > 1 else 3) * request_s
                assert rounds == 0 or rounds >= 5 or (count == 1 and rounds >= 3)
                most = max(most, count)
        assert most == 3
    # Time for three quick ones is too short for one that takes half a second a request.
    assert plan(60, [Cost(0.2, 0.0)] * 4)[0] == 3
    assert plan(60, [Cost(1.0, 0.5)] * 4) == (0, 0, 0.0)
    assert plan(80, [Cost(1.0, 0.5)] * 4)[:2] == (1, 3)
    # What is left of the time is little.
    count, rounds, seconds = plan(200, [Cost(0.5, 0.04)] * 4)
    assert (count, rounds) == (3, 10)
    assert 10 * 5 * (1.5 + 0.5 + seconds + 4 * 1.5 * 0.04) > 0.8 * 200


def test_tuning_begins_only_where_two_settings_can_be_loaded(run: Any) -> None:
    _, executor, search = run(wish={"budget_s": 60.0}, load_s=6.0, speed={STATIC: 2.0})
    assert not executor.names("tune")
    assert "the settings of static on ort:cpu were not tried: the budget is too small" in search.told.notes
    _, executor, _ = run(wish={"budget_s": 60.0}, load_s=0.5, speed={STATIC: 2.0})
    assert executor.names("tune")


def test_where_time_is_short_what_needs_a_judge_is_judged_first_and_each_device_has_its_share(run: Any) -> None:
    _, executor, search = run(speed={STATIC: 2.0})
    judged = [j for j in executor.asked if j.deed.endswith(":judge")][:2]
    lossy = {s.place.model: s.lossy for s in search.seats}
    for job in judged:
        order = [lossy[name] for name, _ in job.params["seats"]]
        assert order == sorted(order, reverse=True)
        assert order[0] and not order[-1]
        # It ends by itself before it is ended.
        assert job.timeout_s is not None
        assert job.timeout_s >= job.params["effort"]["budget_s"] + 5
    first, second = (j.params["effort"]["budget_s"] for j in judged)
    assert second == pytest.approx(2 * first - 1)  # half of the time, and then what is left after a second


def test_one_that_hangs_while_it_is_judged_costs_nobody_else(run: Any) -> None:
    """It takes half of its device's time; what was judged before it counts, what waits behind it has the rest."""
    outcome, executor, search = run(
        wish={"budget_s": 200.0}, hangs={"dynamic"}, speed={STATIC: 2.0, "weights8 on ort:cpu": 3.0},
    )  # fmt: skip
    for device in ("ort:cpu", "openvino:cpu"):
        assert dropped(search, f"dynamic on {device}").startswith("judge: not finished")
        assert not dropped(search, f"weights8 on {device}").startswith("judge")
    assert outcome.winner.place.label == "weights8 on ort:cpu"
    first, again, other, _ = [j for j in executor.asked if j.deed.endswith(":judge")][:4]
    behind = [name for name, _ in again.params["seats"]]
    assert behind == [n for n, _ in first.params["seats"]][1 + [n for n, _ in first.params["seats"]].index("dynamic") :]
    share = first.params["effort"]["budget_s"]
    assert first.stall_s == pytest.approx(share / 2)
    assert again.params["effort"]["budget_s"] == pytest.approx(share / 2 - 1)
    assert other.params["effort"]["budget_s"] >= share  # the next device has what it would have had


def test_a_model_that_cannot_be_judged_costs_only_itself_and_is_not_kept(tmp_path: Path) -> None:
    good, broken = write_artifact(tmp_path / "good", 1.0), write_artifact(tmp_path / "broken", 2.0)
    broken.model_path.write_bytes(b"no model")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).random((8, 2), np.float32))
    params = {
        "device": "ort:cpu", "goal": asdict(Goal(min_sqnr_db=3.0)), "seats": [["broken", "fp32"], ["good", "fp32"]],
        "placed": [], "effort": {"budget_s": 60.0, "so_far": str(tmp_path / "so-far")},
    }  # fmt: skip
    models = {"parent": good.path, "model:good": good.path, "model:broken": broken.path}
    value = judge(params, {**models, "data": tmp_path / "data.npz"}, tmp_path, Progress())
    assert value["incomplete"]  # what failed is no result to be found again
    assert value["found"]["good/fp32"]["quality"]["met"]
    assert list(value["found"]["broken/fp32"]) == ["error"]
    assert read_so_far(tmp_path / "so-far") == (value["found"], None)


def test_what_a_job_told_is_read_as_far_as_it_was_written(tmp_path: Path) -> None:
    tell = teller(str(tmp_path / "so-far"))
    for line in ({"began": "a"}, {"judged": "a", "entry": {"error": "no"}}, {"began": "b"}):
        tell(line)
    assert read_so_far(tmp_path / "so-far") == ({"a": {"error": "no"}}, "b")
    with (tmp_path / "so-far").open("a") as file:
        file.write('{"judged": "b", "ent')
    assert read_so_far(tmp_path / "so-far") == ({"a": {"error": "no"}}, "b")
    teller(str(tmp_path / "nowhere" / "so-far"))({"began": "a"})  # of another machine
    assert read_so_far(tmp_path / "nowhere" / "so-far") == ({}, None)


def test_what_hangs_in_judging_is_not_screened_unless_it_is_the_exported_model(run: Any) -> None:
    outcome, _, search = run(hangs={"fuse-onnxscript", "export"}, speed={STATIC: 2.0})
    assert dropped(search, "fuse-onnxscript on ort:cpu").startswith("judge: not finished")
    assert dropped(search, "export on ort:cpu").startswith("decide: the winner is faster")
    assert outcome.winner.place.label == STATIC


def test_what_is_likely_to_gain_is_screened_first(run: Any) -> None:
    _, executor, search = run(speed={STATIC: 2.0})
    job = next(j for j in executor.asked if j.deed.endswith(":screen"))
    lossy = {s.place.model: s.lossy for s in search.seats}
    order = [lossy[seat["label"].removesuffix(" side by side")] for seat in job.params["seats"][1:]]
    assert order == sorted(order, reverse=True)
    assert order[0] and not order[-1]


def test_each_type_of_machine_has_its_own_winner_measured_there(run: Any) -> None:
    here = machine_of()
    there = {**here, "cpu": "another", "cores_allowed": 8, "flags": ["avx512_vnni"]}
    nodes = (Node("far", 2, there), Node("near", 1, here), Node("far-too", 2, there))
    outcome, executor, search = run(
        nodes=nodes, speed=dict.fromkeys((STATIC,), 1.0),
        speed_on={"near": {"dynamic on ort:cpu": 1.5}, "far": {STATIC: 3.0, "dynamic on ort:cpu": 1.2}},
    )  # fmt: skip
    assert outcome.winner.place.label == "dynamic on ort:cpu"  # of the machine that asked
    timed_on = {j.node for j in executor.asked if j.exclusive}
    assert timed_on == {"near", "far"}  # one of each type
    assert all(j.node is None for j in executor.asked if j.deed.endswith(":make"))
    others = fleet_outcomes(search)
    rows = machine_rows(search, outcome, others)
    assert [r["winner"] for r in rows] == ["dynamic on ort:cpu", STATIC]
    assert rows[1]["label"] == "another, 8 cores, avx512_vnni"
    assert rows[1]["settings"]["threads"] == 8
    assert rows[1]["settings"]["machine"]["cpu"] == "another"
    assert rows[1]["path"] == f"front/static-on-{nodes[0].kind}"
    assert [s.name for s in fleet_front(others)] == [f"static-on-{nodes[0].kind}"]
    document = outcome.document(search, rows)
    assert what_is_wrong(json.loads(json.dumps({**document, "schema_version": 1, "wish": WISH}))) is None


def test_a_machine_that_gives_nothing_says_why_and_harms_nobody(run: Any) -> None:
    here = machine_of()
    nodes = (Node("near", 1, here), Node("far", 1, {**here, "cpu": "another"}))
    outcome, _, search = run(
        nodes=nodes, speed={STATIC: 2.0}, speed_on={"far": {}, "near": {STATIC: 2.0}},
        wish={"limits": Limits(max_latency_ms=0.6)},
    )  # fmt: skip
    assert outcome.winner.place.label == STATIC
    rows = machine_rows(search, outcome, fleet_outcomes(search))
    assert rows[1]["winner"] is None and "nothing keeps what was asked for" in rows[1]["headline"]


def test_calibration_in_parts_is_shared_by_the_schemes_that_can_take_it(run: Any) -> None:
    _, executor, _ = run(wish={"shards": 2}, speed={STATIC: 2.0})
    made = {j.params["name"]: j for j in executor.asked if j.deed.endswith(":make")}
    states = {made[n].inputs["merge"] for n in ("static", "static-auto")}
    assert [p.read_text() for p in states] == ["calibrate shard-000"]  # four rows are one batch
    assert "merge" not in made["dynamic"].inputs


def test_what_was_screened_only_is_called_that(run: Any) -> None:
    tuned = {"static": {"settings": {"session.intra_op.allow_spinning": "0"}}}
    outcome, _, search = run(speed={STATIC: 2.0}, tuned=tuned, takes={"tune": 70.0})
    assert search.timing.report is None
    assert "(screened only, before its settings were searched)" in outcome.headline
    (entry,) = [e for e in outcome.document(outcome.search)["front"] if e["name"] == "static"]
    assert entry["decided"] is False
    assert ratio_text(entry).endswith("(screened)")
    outcome, _, _ = run(speed={STATIC: 2.0})
    (entry,) = [e for e in outcome.document(outcome.search)["front"] if e["name"] == "static"]
    assert entry["decided"] is True
    assert ratio_text(entry).endswith("]")


def test_where_no_last_measurement_can_follow_the_screening_has_its_time(run: Any) -> None:
    for budget_s, share in ((40.0, 0.5), (600.0, 0.25)):
        _, executor, _ = run(wish={"budget_s": budget_s}, speed={STATIC: 2.0})
        number, job = next((n, j) for n, j in enumerate(executor.asked) if j.deed.endswith(":screen"))
        left = budget_s - number  # a second each
        assert job.params["effort"]["budget_s"] > 0.9 * share * left
        assert job.params["effort"]["budget_s"] < (0.7 if share > 0.3 else 0.3) * left


def test_data_that_do_not_fit_end_the_search_after_the_export(run: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", x=np.zeros((4, 3), np.float32))
    with pytest.raises(DataError, match=r"wide\.npz: 'x' has shape"):
        run(wish={"eval_data": str(tmp_path / "wide.npz")})


def test_the_headline_does_not_claim_what_was_not_found_out(run: Any) -> None:
    late = JobTimeoutError("static took longer than 3 s and was ended")
    outcome, _, search = run(fails={"static": late})
    reason = "not finished: the budget is too small (took longer than 3 s and was ended)"
    assert search.failures == [{"label": "static", "error": "took longer than 3 s and was ended"}]
    assert search.variants["static"].dropped == {"phase": "make", "reason": reason}
    assert "nothing that is right was faster, but the budget did not reach 1 candidate" in outcome.headline


def test_an_export_that_takes_the_budget_is_said(run: Any) -> None:
    _, _, search = run(takes={"export": 60.0})
    assert "the export took 60 s of 100 s: a larger --budget finds more" in search.told.notes
    _, _, search = run()
    assert not any("a larger --budget" in note for note in search.told.notes)


def test_a_slow_step_does_not_starve_those_that_wait_for_it(run: Any) -> None:
    _, executor, search = run()
    jobs = [j for j in executor.asked if j.deed.endswith(":make") and j.params["name"] not in ("export", "simplify")]
    limits = [j.timeout_s for j in jobs]
    assert max(limits[:-1]) <= 0.6 * 0.3 * search.wish.budget_s
    assert limits[-1] > limits[-2] - 1.0  # nobody waits for the last one


def test_an_interrupt_does_not_take_half_of_another_machines_measurements_for_its_result(run: Any) -> None:
    here = machine_of()
    nodes = (Node("near", 1, here), Node("far", 1, {**here, "cpu": "another"}))
    gate = threading.Event()
    outcome, _, search = run(nodes=nodes, interrupt="screen", hold=("far", gate))
    try:
        assert outcome.state == "interrupted"
        rows = machine_rows(search, outcome, fleet_outcomes(search))
        assert rows[1] == {**rows[1], "winner": None, "headline": "interrupted before it was measured"}
    finally:
        gate.set()
        stop(search.fleet)
