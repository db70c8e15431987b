"""Settings of a runtime: searched for, measured beside the defaults, and kept in a file."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.data import Dataset
from deploykit.errors import BenchmarkError, DeploykitError
from deploykit.machine import allowed_cores, inspect_machine
from deploykit.progress import Progress
from deploykit.runtimes import parse_device
from deploykit.runtimes.settings import RuntimeSettings, machine_fingerprint
from deploykit.specs import Feeds

if TYPE_CHECKING:
    from deploykit.benchmarks import Candidate, Report, Settings
    from deploykit.benchmarks.budget import Cost
    from deploykit.benchmarks.tuner import Tuning
    from deploykit.benchmarks.tuner_space import Config

TUNED, ANEW = " tuned", " tuned anew"
# Of the budget, what the final measurement takes.
_FINAL_SHARE = 0.4
_SHORTEST_S, _LEAST_WARMUP_S, _LEAST_ROUNDS, _STEPS = 0.25, 0.1, 3, 20
# Of a candidate that was not tuned here: seconds until it is loaded.
_LOAD_S = 0.5


def tuned_candidates(
    candidates: Sequence[Candidate], files: Sequence[str | Path], batch: int, told: Progress
) -> list[Candidate]:
    """Each candidate once more with the settings of every file that is of its device.

    Args:
        candidates: With the runtimes' defaults.
        files: Settings files.
        batch: Samples in one request.
        told: Told what is not as it was when the settings were tuned.

    Raises:
        DataError: A file cannot be read.
        BenchmarkError: A file is of no candidate's device.
    """
    found: list[Candidate] = []
    for number, file in enumerate(files, 1):
        kept = RuntimeSettings.load(file)
        mine = [c for c in candidates if parse_device(c.device) == parse_device(kept.device)]
        if not mine:
            raise BenchmarkError(
                f"{file} is for {kept.device}, which is not measured", hint=f"add --device {kept.device}"
            )
        suffix = TUNED if len(files) == 1 else f"{TUNED} ({number}: {Path(file).name})"
        for candidate in mine:
            for note in kept.notes_for(Path(candidate.path), candidate.sha256):
                told.note(f"{file}: {note}")
        if kept.batch != batch:
            told.note(f"{file}: tuned for batch {kept.batch}, measured with {batch}")
        found += [
            replace(
                c, name=c.name + suffix, tuned=True, precision=kept.precision, threads=kept.threads,
                sessions=kept.sessions, concurrency=kept.concurrency, optimize=kept.optimize,
                settings=dict(kept.settings),
            )
            for c in mine
        ]  # fmt: skip
    return found


class Tuner:
    """A search, and the measurement that judges it.

    Args:
        candidates: With the runtimes' defaults; the reference first.
        settings: Of the measurement.
        feeds_for: Inputs at a batch size.
        told: Told about steps.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        settings: Settings,
        feeds_for: Callable[[int], Sequence[Feeds]],
        told: Progress,
    ) -> None:
        self._candidates = list(candidates)
        self._settings = settings
        self._feeds_for = feeds_for
        self._told = told
        self._began = time.monotonic()

    def run(self, data: Dataset | None, budget_s: float, batches: bool) -> tuple[Report, list[Candidate]]:
        """Search, then measure what was found beside the defaults.

        Args:
            data: With labels, for accuracy.
            budget_s: Seconds for all.
            batches: Whether the model takes batches of any size.

        Returns:
            The report, and its candidates: those with the defaults first.

        Raises:
            BenchmarkError: Nothing could be measured.
        """
        from deploykit.benchmarks import measure

        if self._settings.scenario == "server":
            raise BenchmarkError(
                "the scenario server cannot be tuned", hint="tune for throughput: --scenario offline --tune"
            )
        tunings = self._search(budget_s, batches)
        settings = self._cut(tunings, budget_s, data)
        chosen = [self._with(c, t.chosen) for c, t in tunings.items() if t.chosen != self._base(c)]
        for candidate, tuning in tunings.items():
            base = self._base(candidate)
            if tuning.chosen == base and any(t.paces and t.config != base for t in tuning.trials):
                self._told.note(f"{candidate.label}: nothing that was tried is faster than the settings it has")
            elif tuning.chosen == base:
                self._told.note(f"{candidate.label} keeps the settings it has: the budget reached no others")
        candidates = [*self._candidates, *chosen]
        report = measure(
            candidates, self._feeds_for(settings.batch), settings, data=data, progress=self._told,
            within_s=self._left(budget_s),
        )  # fmt: skip
        report.data["tuning"] = self._record(tunings, budget_s)
        spent = time.monotonic() - self._began
        if spent > 1.1 * budget_s:
            self._told.note(f"it took {spent:.0f} s instead of {budget_s:g}: loading and single requests take too long")
        report.data["notes"] = list(self._told.notes)
        return report, candidates

    @property
    def _suffix(self) -> str:
        return ANEW if any(c.tuned for c in self._candidates) else TUNED

    @property
    def _objective(self) -> str:
        return "throughput" if self._settings.scenario == "offline" else "latency"

    def _base(self, candidate: Candidate) -> Config:
        from deploykit.benchmarks.tuner_space import Config

        settings = self._settings
        return Config(
            candidate.threads or settings.threads or allowed_cores(),
            sessions=candidate.sessions,
            concurrency=candidate.concurrency or settings.concurrency or 1,
            batch=settings.batch,
            precision=candidate.precision or settings.precision,
            optimize=candidate.optimize,
            settings=tuple(sorted(candidate.settings.items())),
        )

    def _search(self, budget_s: float, batches: bool) -> dict[Candidate, Tuning]:
        from deploykit.benchmarks.arena import ProcessArena
        from deploykit.benchmarks.tuner import search
        from deploykit.benchmarks.tuner_space import stages_for

        machine, found = inspect_machine(), {}
        deadline = self._began + budget_s * (1 - _FINAL_SHARE)
        mine = [c for c in self._candidates if not c.tuned]
        for number, candidate in enumerate(mine):
            share = (deadline - time.monotonic()) / (len(mine) - number)
            stages = stages_for(
                candidate.device, self._objective, machine, native=self._settings.precision == "native",
                batches=batches and len(mine) == 1 and self._settings.batch == 1, cores=self._settings.threads,
                concurrency=self._settings.concurrency,
            )  # fmt: skip
            with tempfile.TemporaryDirectory(prefix="deploykit-tune-") as name:
                step = self._told.step(f"tune {candidate.label} for {self._objective}")
                by_wall = self._objective == "throughput"
                place = Path(name)
                with step, ProcessArena(candidate, self._settings, self._feeds_for, place, by_wall=by_wall) as arena:
                    found[candidate] = search(
                        self._base(candidate), stages, arena, share,
                        told=lambda text, left, of: self._told.advance(of - left, of, f"settings of {text}"),
                    )  # fmt: skip
        return found

    def _left(self, budget_s: float) -> float:
        return self._began + budget_s - time.monotonic()

    def _cut(self, tunings: Mapping[Candidate, Tuning], budget_s: float, data: Dataset | None) -> Settings:
        """Rounds and seconds that the rest of the budget allows, and the batch that was chosen."""
        from deploykit.benchmarks.budget import takes

        settings = self._settings
        batch = max([t.chosen.batch for t in tunings.values()], default=settings.batch)
        settings = replace(settings, batch=batch, confirm=False)
        costs = self._costs(tunings, batch)
        by_wall, sets = settings.scenario == "offline", len(self._feeds_for(batch))
        left = self._left(budget_s) - _evaluation_s(data, costs, batch)

        def cut(rounds: int, seconds: float) -> Settings:
            warmup = max(_LEAST_WARMUP_S, min(settings.warmup_s, seconds / 2))
            return replace(settings, rounds=rounds, seconds=seconds, warmup_s=warmup)

        def fits(rounds: int, seconds: float) -> bool:
            warmup = cut(rounds, seconds).warmup_s
            return takes(costs, rounds, seconds, warmup, by_wall=by_wall, sets=sets) <= left

        shortest = min(_SHORTEST_S, settings.seconds)
        for rounds in range(settings.rounds, _LEAST_ROUNDS - 1, -1):
            if fits(rounds, settings.seconds):
                return cut(rounds, settings.seconds)
            if fits(rounds, shortest):
                low, high = shortest, settings.seconds
                for _ in range(_STEPS):  # what fits, and what does not, come together
                    middle = (low + high) / 2
                    low, high = (middle, high) if fits(rounds, middle) else (low, middle)
                return cut(rounds, low)
        return cut(min(settings.rounds, _LEAST_ROUNDS), shortest)

    def _costs(self, tunings: Mapping[Candidate, Tuning], batch: int) -> list[Cost]:
        """What each candidate takes, and each that was tuned with what was chosen for it, by what the search saw."""
        from deploykit.benchmarks.budget import START_S, TUNED_WARM_S, Cost
        from deploykit.benchmarks.measurement import concurrencies

        by_wall = self._objective == "throughput"

        def cost(candidate: Candidate, config: Config, tuning: Tuning) -> Cost:
            paces = [t.paces for t in tuning.trials if t.config == config and t.paces]
            request_s = float(np.median(paces[-1])) * batch / 1e9 if paces else 0.0
            asked = candidate.concurrency or self._settings.concurrency
            swept = 1 if asked or config != self._base(candidate) else len(concurrencies(candidate))
            found = Cost(0.0, request_s, config.concurrency if by_wall else 1, swept)
            return found._replace(load_s=max(0.0, tuning.load_s - START_S - found.warm_s(TUNED_WARM_S)))

        known = {c: cost(c, self._base(c), t) for c, t in tunings.items()}
        worst = max(known.values(), key=lambda c: c.load_s + c.request_s, default=Cost(_LOAD_S, 0.0))
        found = [known.get(c, worst) for c in self._candidates]
        return found + [cost(c, t.chosen, t) for c, t in tunings.items() if t.chosen != self._base(c)]

    def _with(self, candidate: Candidate, config: Config) -> Candidate:
        concurrency = None if self._objective == "latency" else config.concurrency
        return replace(
            candidate, name=candidate.name + self._suffix, tuned=True, precision=config.precision,
            threads=config.threads, sessions=config.sessions, concurrency=concurrency, optimize=config.optimize,
            settings=dict(config.settings),
        )  # fmt: skip

    def _record(self, tunings: dict[Candidate, Tuning], budget_s: float) -> dict[str, Any]:
        return {
            "objective": self._objective,
            "budget_s": budget_s,
            "spent_s": round(time.monotonic() - self._began, 1),
            "chosen": {c.label: t.chosen.as_dict() for c, t in tunings.items()},
            "trials": [
                s.as_dict() | {"device": c.device, "model": c.name} for c, t in tunings.items() for s in t.trials
            ],
        }


def _evaluation_s(data: Dataset | None, costs: Sequence[Cost], batch: int) -> float:
    """Seconds for the accuracy of all candidates over a whole dataset; 0 where it has no labels, or no known length."""
    if data is None or not data.has_labels or data.length is None:
        return 0.0
    return sum(c.alone_s for c in costs) / batch * data.length


def save_winner(report: Report, candidates: Sequence[Candidate], path: Path, told: Progress) -> None:
    """Write the settings of the winner, or of the first that ties with it; where it cannot be, that is said.

    Args:
        report: Of the measurement.
        candidates: As they were measured.
        path: A new file.
        told: Told which settings they are; the measurement is worth more than the file.
    """
    labels, settings = report.winner["candidates"], report.data["settings"]
    best = next((c for label in labels for c in candidates if c.label == label), None)
    if best is None:
        told.note(f"no settings are kept in {path}: {report.headline()}")
        return
    found = next(e for e in report.candidates if (e["name"], e["device"]) == (best.name, best.device))
    kept = RuntimeSettings(
        device=best.device, threads=best.threads or settings["threads"] or allowed_cores(), sessions=best.sessions,
        concurrency=found.get("concurrency") or 1, precision=best.precision or settings["precision"],
        batch=settings["batch"], optimize=best.optimize, settings=dict(best.settings),
        machine=machine_fingerprint(best.device), model_sha256=best.sha256,
    )  # fmt: skip
    try:
        kept.save(path)
        how = "" if best.tuned else ", as it was: nothing that was found is better"
        told.note(f"settings of {best.label} are in {path}{how}")
    except DeploykitError as exc:
        told.note(f"the settings of {best.label} could not be kept: {exc}")
