"""What all views of a report say in the same words: where and how it was measured, and who is out of the race."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deploykit.benchmarks.page_drawing import clean
from deploykit.benchmarks.report import Report


def label_of(candidate: Mapping[str, Any]) -> str:
    """Name and device."""
    return f"{candidate['name']} on {candidate['device']}"


def timed(candidate: Mapping[str, Any]) -> bool:
    """Whether there are latencies of it."""
    return "median_ms" in candidate and bool(candidate.get("rounds"))


def in_race(candidate: Mapping[str, Any]) -> bool:
    """Whether it could have won."""
    return bool(candidate["status"] == "ok") and timed(candidate)


def scenario_of(report: Report) -> str:
    """ "latency", "offline" or "server"; the first version of the report knew one."""
    found: str = report.data.get("scenario") or report.data["settings"].get("scenario") or "latency"
    return found


def how_measured(report: Report) -> str:
    """One line about rounds, batch, threads, inputs and noise."""
    settings, machine = report.data["settings"], report.data["environment"]["machine"]
    rounds = f"{settings['rounds']} rounds of {settings['seconds']:g} s"
    if report.interrupted:
        rounds = f"interrupted: fewer than {rounds}"
    objective = objective_of(report)
    kept = "" if objective is None else f", p99 within {objective:g} ms"
    return (
        f"scenario {scenario_of(report)}, {rounds}{kept}, batch {settings['batch']}, "
        f"{settings['threads'] or machine['cores_allowed']} threads, precision {settings['precision']}, inputs: "
        f"{settings['inputs']}; noise floor {report.data['noise_floor']:.1%} (the reference against itself)"
    )


def summary(report: Report) -> list[str]:
    """How it was measured, what the search chose, and who won: lines below the table on a terminal."""
    lines = [how_measured(report)]
    tuning = report.data.get("tuning")
    if tuning:
        lines.append(
            f"tuned for {tuning['objective']} in {tuning['spent_s']:g} s (search and measurement), "
            f"{len(tuning['trials'])} trials:"
        )
        kept = {f"{t['model']} on {t['device']}": t["label"] for t in tuning["trials"] if t["kept"]}
        lines += [f"  {candidate}: {label}" for candidate, label in kept.items()]
    return [*lines, report.headline()]


def environment_line(environment: Mapping[str, Any]) -> str:
    """One line about machine and packages."""
    machine = environment["machine"]
    flags = [name for name, there in machine["flags"].items() if there]
    packages = [f"{name} {version}" for name, version in environment["packages"].items()]
    return ", ".join(
        [machine["cpu"], f"{machine['cores_allowed']} cores", *flags, *packages, f"Python {environment['python']}"]
    )


def environment_facts(report: Report) -> list[tuple[str, str]]:
    """Everything that is known about the environment and the settings, a name and a text each."""
    data = report.data
    facts = machine_facts(data["environment"])
    facts += [(f"setting {words(key)}", plain(value)) for key, value in data["settings"].items()]
    facts += [("report", f"schema {data['schema_version']}, DeployKit {data['deploykit']}, {data['created']}")]
    return [*facts, ("intervals", plain(data.get("interval")))]


def machine_facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything that is known about an environment, a name and a text each."""
    machine = dict(environment["machine"])
    memory = machine.pop("memory_bytes", None)
    flags = machine.pop("flags")
    facts = [(words(key), plain(value)) for key, value in machine.items()]
    facts.append(("memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB"))
    facts.append(("instruction sets", _listed(flags)))
    for key in ("load_average", "python", "platform"):
        facts.append((words(key), plain(environment.get(key))))
    facts += [(f"package {name}", plain(version)) for name, version in environment["packages"].items()]
    facts += [(f"variable {name}", plain(value)) for name, value in (environment.get("variables") or {}).items()]
    return facts


def out_of_race(report: Report) -> list[tuple[str, str]]:
    """Label and reason of every candidate that could not win."""
    return [(label_of(c), c["status"]) for c in report.candidates if c["status"] != "ok"]


def notes_of(report: Report) -> list[str]:
    """What the user must know, with drift and interruptions named."""
    notes = [str(note) for note in report.data.get("notes", ())]
    for c in report.candidates:
        drift = c.get("drift") or {}
        if drift.get("flagged"):
            notes.append(
                f"{label_of(c)} was not steady: the second half of a round took {drift['ratio']:.2f} times the first"
            )
    if report.interrupted and not any("interrupted" in note for note in notes):
        notes.append("an interrupt ended the measurement early")
    return notes


def cosine_of(candidate: Mapping[str, Any], *, reference: bool) -> float | None:
    """Cosine of the outputs to the reference's; 1 for the reference; None where it was not compared."""
    if reference:
        return 1.0
    found = (candidate["outputs"] or {}).get("cosine")
    return float(found) if found is not None and math.isfinite(found) else None


def objective_of(report: Report) -> float | None:
    """Milliseconds that the 99th percentile had to keep within, in the scenario "server"."""
    found = report.data["settings"].get("slo_p99_ms")
    return None if found is None else float(found)


def visible(report: Report) -> Report:
    """A copy for a terminal: a file's texts may hold escape sequences, which are spelled out."""
    return Report(visible_data(report.data))


def visible_data(value: Any) -> Any:
    """The same for any JSON."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(k): v if k == "samples_ns" else visible_data(v) for k, v in value.items()}
    return [visible_data(v) for v in value] if isinstance(value, list) else value


def plain(value: Any) -> str:
    """A value out of JSON as a short text."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={plain(v)}" for k, v in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(plain(v) for v in value) or "none"
    return str(value)


def _listed(flags: Mapping[str, Any]) -> str:
    have = [name for name, there in flags.items() if there]
    lack = [name for name, there in flags.items() if not there]
    return f"{', '.join(have) or 'none'}" + (f"; without {', '.join(lack)}" if lack else "")


def words(key: str) -> str:
    """A key of JSON as words."""
    return key.replace("_", " ")
