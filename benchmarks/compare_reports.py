"""Two reports of different days: what changed, and whether conditions on that fail.

Candidates are matched by name and device. The two runs share no rounds, so that intervals come from resampling the
rounds of each run alone, widened by the noise that each run measured on itself. A condition such as `latency>5%` fails
where the whole interval lies beyond its limit; with `strict`, where the measured change does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploykit.benchmarks.compare_changes import Change, Check, change_of, judge, old_and_new, value_of
from deploykit.benchmarks.compare_rules import METRICS, Rule
from deploykit.benchmarks.compare_settings import machine_differences, notes_about, settings_differences
from deploykit.benchmarks.markdown import escape, pipe_table
from deploykit.benchmarks.report import Report
from deploykit.benchmarks.wording import in_race, label_of
from deploykit.errors import BenchmarkError


@dataclass(frozen=True, slots=True)
class Pair:
    """A candidate in both reports.

    Attributes:
        old: Its label then.
        new: Its label now.
        raced: Whether it was in the race then; if not, no condition is about it.
        status: As the new report has it: "ok", or why it is out of the race.
        same_file: Whether the model is the same, by its sha256.
        changes: By the metric's name.
        lost: Metrics that the old report held of it and the new one does not.
    """

    old: str
    new: str
    raced: bool
    status: str
    same_file: bool
    changes: Mapping[str, Change]
    lost: tuple[str, ...]

    @property
    def fell_out(self) -> bool:
        """Whether it was in the race then and is not now."""
        return self.raced and self.status != "ok"

    @property
    def label(self) -> str:
        """For a person."""
        return self.old if self.old == self.new else f"{self.old} -> {self.new}"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A condition on one candidate.

    Attributes:
        rule: As it was written; "" where a candidate is missing.
        candidate: Its label.
        outcome: What became of it.
        text: What was measured.
    """

    rule: str
    candidate: str
    outcome: Check
    text: str

    @property
    def failed(self) -> bool:
        """Whether it makes the comparison fail."""
        return self.outcome is Check.FAILED


@dataclass(frozen=True, slots=True)
class ReportComparison:
    """What changed between two reports.

    Attributes:
        pairs: Candidates that both hold.
        missing: Labels that only the old one holds.
        added: Labels that only the new one holds.
        judgements: Every condition on every candidate.
        notes: What the user must know.
        winners: The headline then and now.
    """

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    judgements: tuple[Judgement, ...]
    notes: tuple[str, ...]
    winners: tuple[str, str]

    @property
    def failed(self) -> bool:
        """Whether any condition failed."""
        return any(j.failed for j in self.judgements)

    def headline(self) -> str:
        """One sentence."""
        failed = [j for j in self.judgements if j.failed]
        if failed:
            return f"failed: {len(failed)} of {len(self.judgements)} checks"
        if not any(j.rule for j in self.judgements):
            return "compared; no condition was asked for"
        unsure = sum(j.outcome in (Check.UNPROVEN, Check.OPEN) for j in self.judgements)
        doubt = f", {unsure} of them because the measurement is too noisy to tell" if unsure else ""
        return f"passed: {len(self.judgements)} checks{doubt}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return {
            "schema_version": 1,
            "failed": self.failed,
            "winners": {"old": self.winners[0], "new": self.winners[1]},
            "candidates": [
                {
                    "old": p.old, "new": p.new, "raced": p.raced, "status": p.status, "same_file": p.same_file,
                    "lost": list(p.lost),
                    "changes": [c.as_dict() for c in p.changes.values()],
                }
                for p in self.pairs
            ],
            "missing": list(self.missing),
            "added": list(self.added),
            "judgements": [
                {"rule": j.rule, "candidate": j.candidate, "outcome": str(j.outcome), "text": j.text}
                for j in self.judgements
            ],
            "notes": list(self.notes),
        }  # fmt: skip

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows: the change of every metric that any candidate has; of the latency the values too."""
        used = [name for name in METRICS if any(name in p.changes for p in self.pairs)]
        header = ["candidate", "file", *(["median ms"] if "latency" in used else []), *used]
        return tuple(header), [self._row(p, used) for p in self.pairs]

    @staticmethod
    def _row(pair: Pair, used: Sequence[str]) -> tuple[str, ...]:
        cells = [pair.label, "same" if pair.same_file else "changed"]
        if "latency" in used:
            cells.append(old_and_new(pair.changes["latency"]) if "latency" in pair.changes else "not timed")
        return (*cells, *(pair.changes[n].shown() if n in pair.changes else "-" for n in used))

    def lines(self) -> list[str]:
        """Judgements, what is missing or new, winners and notes; one line each."""
        found = []
        for j in self.judgements:
            found.append(f"{j.outcome}: {j.rule + ', ' if j.rule else ''}{j.candidate}: {j.text}")
        found += [f"new: {label}" for label in self.added]
        then, now = self.winners
        found.append(f"before and now: {now}" if then == now else f"before: {then}; now: {now}")
        return [*found, *(f"note: {note}" for note in self.notes)]

    def to_markdown(self) -> str:
        """For a pull request."""
        lines = [f"**{escape(self.headline())}**", "", *pipe_table(*self.table()), ""]
        return "\n".join([*lines, *(f"- {escape(line)}" for line in self.lines())]) + "\n"


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """What is compared, and how strictly.

    Attributes:
        rules: Conditions that fail the comparison.
        renamed: Old name or label to new name or label, for candidates that are called differently now.
        strict: Whether the measured change decides alone, without its interval.
        allow_missing: Whether candidates may be gone, or out of the race.
        allow_different_machine: Whether the two may come from different machines.
        allow_different_settings: Whether the two may be measured in different ways.
    """

    rules: tuple[Rule, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    allow_missing: bool = False
    allow_different_machine: bool = False
    allow_different_settings: bool = False


def compare_reports(old: Report, new: Report, options: CompareOptions | None = None) -> ReportComparison:
    """Compare two reports.

    Args:
        old: The one to compare with, such as the main branch's.
        new: The one in question.
        options: See `CompareOptions`.

    Raises:
        BenchmarkError: Machines or settings differ and may not, no candidate is in both, or neither report holds a
            metric that a condition is about.
    """
    asked = options or CompareOptions()
    notes = notes_about(old, new)
    matched, missing, added = _match(old, new, asked.renamed)
    notes += _refuse_or_note(
        "machines", machine_differences(old, new), asked.allow_different_machine, "--allow-different-machine"
    )
    notes += _refuse_or_note(
        "settings", settings_differences(old, new, matched), asked.allow_different_settings,
        "--allow-different-settings",
    )  # fmt: skip
    notes += [f"{r.text} fails where {r.metric.name} gets better" for r in asked.rules if r.welcomes]
    noise = (1 + float(old.data["noise_floor"])) * (1 + float(new.data["noise_floor"]))
    batches = (int(old.data["settings"]["batch"]), int(new.data["settings"]["batch"]))
    pairs = tuple(_pair(a, b, batches, noise) for a, b in matched)
    judgements = _missing(missing, pairs, asked) + [j for rule in asked.rules for j in _judged(rule, pairs, asked)]
    winners = (old.headline(), new.headline())
    return ReportComparison(pairs, tuple(missing), tuple(added), tuple(judgements), tuple(notes), winners)


def _refuse_or_note(what: str, differences: Sequence[str], allowed: bool, option: str) -> list[str]:
    if differences and not allowed:
        raise BenchmarkError(
            f"the {what} differ: {'; '.join(differences)}",
            expected="two reports whose figures can be compared",
            hint=f"{option} compares them all the same",
        )
    return [f"the {what} differ: {text}" for text in differences]


Matched = list[tuple[dict[str, Any], dict[str, Any]]]


def _match(old: Report, new: Report, renamed: Mapping[str, str]) -> tuple[Matched, list[str], list[str]]:
    """Pairs, labels that are missing, and labels that are new."""
    now = {label_of(c): c for c in new.candidates}
    then = {label_of(c): c for c in old.candidates}
    if len(now) < len(new.candidates) or len(then) < len(old.candidates):
        raise BenchmarkError("a report holds two candidates of one name and device", hint="give the models other names")
    for source, target in renamed.items():
        known = (
            (source, then, {c["name"] for c in old.candidates}, "old"),
            (target, now, {c["name"] for c in new.candidates}, "new"),
        )
        for name, labels, names, which in known:
            if name not in labels and name not in names:
                raise BenchmarkError(f"the {which} report has no candidate {name!r}", expected=", ".join(labels))
    matched, missing = [], []
    for label, candidate in then.items():
        name = renamed.get(candidate["name"], candidate["name"])
        target = renamed.get(label, f"{name} on {candidate['device']}")
        if target in now:
            matched.append((candidate, now[target]))
        else:
            missing.append(label)
    if not matched:
        raise BenchmarkError(
            f"no candidate is in both reports: {', '.join(then)} in the old one, {', '.join(now)} in the new one",
            hint="say which belong together: --match OLD=NEW",
        )
    taken = {label_of(b) for _, b in matched}
    if len(taken) < len(matched):
        raise BenchmarkError("two candidates of the old report are matched with one of the new one")
    return matched, missing, [label for label in now if label not in taken]


def _pair(a: Mapping[str, Any], b: Mapping[str, Any], batches: tuple[int, int], noise: float) -> Pair:
    changes = {}
    for metric in METRICS:
        change = change_of(a, b, metric, batches=batches, noise=noise)
        if change is not None:
            changes[metric] = change
    lost = tuple(m for m in METRICS if m not in changes and value_of(a, m) is not None)
    return Pair(label_of(a), label_of(b), in_race(a), str(b["status"]), a["sha256"] == b["sha256"], changes, lost)


def _missing(missing: Sequence[str], pairs: Sequence[Pair], asked: CompareOptions) -> list[Judgement]:
    """Candidates that are gone, or out of the race, fail the comparison unless that is allowed."""
    outcome = Check.HELD if asked.allow_missing else Check.FAILED
    found = [Judgement("", label, outcome, "is not in the new report") for label in missing]
    return found + [Judgement("", p.label, outcome, f"is out of the race now: {p.status}") for p in pairs if p.fell_out]


def _judged(rule: Rule, pairs: Sequence[Pair], asked: CompareOptions) -> list[Judgement]:
    name, found = rule.metric.name, []
    for pair in (p for p in pairs if p.raced):
        change = pair.changes.get(name)
        if change is not None:
            outcome = judge(rule, change, strict=asked.strict)
            found.append(Judgement(rule.text, pair.label, outcome, change.shown(rule.unit)))
        elif name in pair.lost and pair.status == "ok":
            outcome = Check.HELD if asked.allow_missing else Check.FAILED
            found.append(Judgement(rule.text, pair.label, outcome, f"the new report holds no {name} of it"))
    if not found and not any(p.fell_out and name in p.lost for p in pairs):
        raise BenchmarkError(
            f"no candidate has {name} in both reports, so {rule.text} says nothing", hint=_ABSENT.get(name)
        )
    return found


_ABSENT = {
    "accuracy": "measure with labels: deploykit benchmark --data DATA, with 'labels' in it",
    "f1": "measure with labels: deploykit benchmark --data DATA, with 'labels' in it",
    "p90": "it needs 64 samples: raise --seconds or --rounds",
    "p99": "it needs 662 samples: raise --seconds or --rounds",
    "rate": "it is measured in the scenario server",
    "verdict": "it needs a second candidate beside the reference",
}
