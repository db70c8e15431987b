"""Whether two reports were measured on the same machine and in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deploykit.benchmarks.report import Report
from deploykit.benchmarks.wording import label_of, plain, scenario_of

# How much memory may differ: a virtual machine of one size does not always get the same.
_MEMORY_SHARE = 0.1
_MIN_ROUNDS = 10
# What decides how exact a report is, not what it measures; and files, which stand elsewhere on another machine.
_HARMLESS = {"rounds", "seconds", "warmup_s", "seed", "max_drop", "min_cosine", "inputs", "labelled_data", "confirm"}


def machine_differences(old: Report, new: Report) -> list[str]:
    """What differs, one text each: CPU, instruction sets, cores, threads of a core, memory by more than a tenth."""
    then, now = (r.data["environment"]["machine"] for r in (old, new))
    found = [
        _differs(key.replace("_", " "), then.get(key), now.get(key))
        for key in ("cpu", "architecture", "cores_allowed")
        if then.get(key) != now.get(key)
    ]
    smt = (then.get("threads_per_core"), now.get("threads_per_core"))
    if None not in smt and smt[0] != smt[1]:
        found.append(_differs("threads per core", *smt))
    flags = sorted({*then["flags"], *now["flags"]})
    changed = [f for f in flags if bool(then["flags"].get(f)) != bool(now["flags"].get(f))]
    if changed:
        gone = [f for f in changed if then["flags"].get(f)]
        come = [f for f in changed if now["flags"].get(f)]
        parts = ([f"gone: {', '.join(gone)}"] if gone else []) + ([f"new: {', '.join(come)}"] if come else [])
        found.append(f"instruction sets ({'; '.join(parts)})")
    memory = (then.get("memory_bytes"), now.get("memory_bytes"))
    if None not in memory and abs(memory[0] - memory[1]) > _MEMORY_SHARE * max(memory):
        found.append(_differs("memory", *(f"{m / 2**30:.1f} GiB" for m in memory)))
    return found


def settings_differences(
    old: Report, new: Report, matched: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> list[str]:
    """What differs, one text each: the scenario, threads, batch, precision, and the runtimes' own settings."""
    found = []
    if scenario_of(old) != scenario_of(new):
        found.append(_differs("scenario", scenario_of(old), scenario_of(new)))
    then, now = (_effective(r) for r in (old, new))
    # A report of an older version lacks the newer settings; they had one value then, and null stands for it.
    keys = [k for k in dict.fromkeys([*then, *now]) if k not in _HARMLESS and k != "scenario"]
    found += [_differs(k.replace("_", " "), then.get(k), now.get(k)) for k in keys if then.get(k) != now.get(k)]
    for a, b in matched:
        found += [f"{label_of(b)}: {text}" for text in _candidate_differences(a, b)]
    return found


def _effective(report: Report) -> dict[str, Any]:
    """The settings, with the threads that were used where none were asked for."""
    settings: dict[str, Any] = report.data["settings"]
    return settings | {"threads": settings["threads"] or report.data["environment"]["machine"]["cores_allowed"]}


def _candidate_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    if a["precision"] != b["precision"]:
        yield _differs("precision", a["precision"], b["precision"])
    then, now = a["settings"] or {}, b["settings"] or {}
    # A runtime of another version may name more of its settings, or fewer.
    for key in then.keys() & now.keys():
        if then[key] != now[key]:
            yield _differs(key, then[key], now[key])
    counts = [(c["accuracy"] or {}).get("samples") for c in (a, b)]
    if None not in counts and counts[0] != counts[1]:
        yield _differs("samples that the accuracy was measured on", *counts)


def notes_about(old: Report, new: Report) -> list[str]:
    """Versions that differ, which is often what one compares, and what makes intervals less sure."""
    then, now = old.data["environment"], new.data["environment"]
    found = []
    for name in dict.fromkeys([*then["packages"], *now["packages"]]):
        versions = (then["packages"].get(name, "absent"), now["packages"].get(name, "absent"))
        if versions[0] != versions[1]:
            found.append(_differs(name, *versions))
    pairs = [
        ("Python", then["python"], now["python"]),
        ("kernel", then["machine"].get("kernel"), now["machine"].get("kernel")),
        ("DeployKit", old.data["deploykit"], new.data["deploykit"]),
        ("inputs", old.data["settings"]["inputs"], new.data["settings"]["inputs"]),
        ("variables", then.get("variables") or {}, now.get("variables") or {}),
    ]
    found += [_differs(name, a, b) for name, a, b in pairs if a != b]
    for which, report in (("old", old), ("new", new)):
        rounds = len(report.candidates[0]["rounds"])
        if rounds < _MIN_ROUNDS:
            found.append(f"the {which} report has {rounds} rounds: intervals are wide, small changes stay unproven")
        if report.interrupted:
            found.append(f"the {which} report was interrupted")
        if "thinned" in report.data:
            found.append(f"the {which} report is a thinned copy, so its percentiles are rough")
    return found


def _differs(name: str, then: Any, now: Any) -> str:
    return f"{name} {plain(then)}, now {plain(now)}"
