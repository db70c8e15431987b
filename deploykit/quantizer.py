"""Makes a quantized model that keeps what is asked, gains speed, and is proven to run in int8."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploykit import optimizers
from deploykit.artifact import Evidence, sha256_of
from deploykit.data import Dataset
from deploykit.deriving import Work, memory_short
from deploykit.engines import Distance, Entry, choose, judge_entry, record, timed
from deploykit.errors import AccuracyError, DataError, DeploykitError, InferenceError, OptimizationError
from deploykit.gating import (
    SMALLEST_MS,
    Gate,
    check_speed,
    faster_as_a_whole,
    quick_ms,
    slow_layers,
    time_against_parent,
)
from deploykit.goals import Goal, Judge, Score
from deploykit.models import benchmark_feeds
from deploykit.optimizers import (
    DynamicConfig,
    HalfConfig,
    StaticConfig,
    StepResult,
    WeightsConfig,
    for_engine,
    optimize,
    own_options,
)
from deploykit.optimizers.base import Run
from deploykit.proof import prove_placement
from deploykit.ranking import LayerError, rank_layers
from deploykit.runtimes import Device, open_session
from deploykit.runtimes.plugged import runtime_tools
from deploykit.targeting import reach
from deploykit.weights import WHOLE_LIMIT_BYTES

Config = DynamicConfig | StaticConfig | WeightsConfig | HalfConfig
# Rows that rank layers, and rows that show whether a model collapsed where no target was given.
_RANKED_ROWS, CHECKED_ROWS = 64, 256
_SLOW_ROUNDS = 2
_FINE_BLOCK = 32
ENGINES = ("deploykit", "nncf")  # of "both"
NOT_CERTIFIED = "not certified: made-up inputs"


def escalate(model: Path, config: Config) -> Iterator[Config]:
    """Settings to try, from cheap to costly: what the user asked for, then what keeps more of the numbers."""
    yield config
    if isinstance(config, HalfConfig):
        return
    if isinstance(config, WeightsConfig):
        if config.block is None or config.block > _FINE_BLOCK:
            config = replace(config, block=_FINE_BLOCK)
            yield config
        if config.bits < 8:
            yield replace(config, bits=8)
        return
    if not config.per_channel:
        config = replace(config, per_channel=True)
        yield config
    if isinstance(config, StaticConfig):
        yield from (other for other in optimizers.escalation(model, config) if other != config)


@dataclass(slots=True)
class Quantizer:
    """Makes a quantized model and proves it; what `derive` asks for.

    Attributes:
        config: How to quantize.
        goal: What it has to keep.
        further: Whether other settings are tried before layers stay in float.
        eval_data: What that is judged on; the step's own data where it is None.
        gate: What its speed is held to.
        min_cosine: What the comparison at the end asks for; a choice between engines has to know.
        check_rows: Rows of real data that a result without a target is judged on; 0 for none.
        reasons: Why layers stay in float, by node or operator type.
        judge: Holds the parent's outputs, where there are real data.
        score: Of the model of this digest.
    """

    config: Config
    goal: Goal
    further: bool
    eval_data: str | Path | None
    gate: Gate
    min_cosine: float = -1.0
    check_rows: int = CHECKED_ROWS
    reasons: dict[str, str] = field(default_factory=dict)
    judge: Judge | None = None
    score: tuple[str, Score] | None = None
    _trials: int = 0

    @property
    def cure(self) -> str:
        """What to do where the result is too far from its parent."""
        if isinstance(self.config, WeightsConfig):
            return "use --bits 8 or a smaller --block, or leave layers out with --exclude"
        if isinstance(self.config, HalfConfig):
            return "take bf16, whose range is that of float32, or leave layers out with --exclude"
        return "give more calibration data, or leave layers out with --exclude"

    @property
    def unfused(self) -> bool:
        """A parent has to run as it will be served."""
        return False

    def make(self, work: Work, target: Path) -> StepResult:
        """Quantize until the target is met, then give back to float what int8 slows down."""
        self._open_judge(work)
        if isinstance(self.config, StaticConfig) and self.config.engine == "both":
            place, made = self._contest(work, self.config)
        else:
            place, made = self._best(work)
        for file in sorted(place.parent.iterdir()):
            if file.name.startswith(place.name):  # with its external data
                shutil.move(file, target.parent / file.name)
        plugins = (self.judge.tools if self.judge else {}) | runtime_tools(self.gate.devices)
        return replace(made, tools=made.tools | plugins)

    def _best(self, work: Work) -> tuple[Path, StepResult]:
        """What one engine can do."""
        self.reasons = dict.fromkeys(self.config.exclude, "excluded")
        config, notes, extra = self.config, list[str](), dict[str, Any]()
        if self.goal.asked:
            place, made, config, notes, extra = self._reach(work)
        else:
            place, made = self._quantize(work, config)
        place, made, config, slower = self._give_back_slow(work, place, made, config)
        params = {**made.params, **extra, **({"float_because_slower": slower} if slower else {})}
        return place, replace(made, notes=(*made.notes, *notes), params=params)

    def _contest(self, work: Work, config: StaticConfig) -> tuple[Path, StepResult]:
        """Let each engine do its best, and keep the better model.

        Raises:
            OptimizationError: All of them failed.
            AccuracyError: None of them reaches the target.
        """
        assert self.judge is not None  # static quantization has data
        distance, entries, problems = Distance(work, self.min_cosine), list[Entry](), list[DeploykitError]()
        made: list[tuple[Path, StepResult, dict[str, str], tuple[str, Score]] | None] = []
        for engine in ENGINES:
            self.config, self.score = for_engine(config, engine), None
            try:
                place, result = self._best(work)
                scored = self._scored(place, self.judge)
            except (OptimizationError, AccuracyError, InferenceError) as exc:
                problems.append(exc)
                entries.append(Entry(engine, refused=exc.what))
                made.append(None)
                continue
            entries.append(judge_entry(engine, scored[1], self.goal, distance.too_far(place)))
            made.append((place, result, self.reasons, scored))
        if len(problems) == len(entries):
            raise problems[0]
        with work.told.step("time the engines' models"):
            entries = timed(entries, [found[0] if found else None for found in made], work, self.gate)
        kept, why = choose(entries, self.goal)
        winner = made[kept]
        assert winner is not None
        place, result, self.reasons, self.score = winner
        self.config = for_engine(config, entries[kept].engine)
        notes = [f"engine {entries[kept].engine} is kept"]
        notes += [f"engine {e.engine} is not: {reason}" for e, reason in zip(entries, why, strict=True) if reason]
        if names := own_options(config):
            notes.append(f"{', '.join(names)}: for the engine deploykit only")
        params = {**result.params, "engines": [record(e, reason) for e, reason in zip(entries, why, strict=True)]}
        return place, replace(result, notes=(*result.notes, *notes), params=params)

    def _open_judge(self, work: Work) -> None:
        contest = isinstance(self.config, StaticConfig) and self.config.engine == "both"
        if not self.check_rows and not self.goal.asked and not contest:
            return
        data = Dataset.open(self.eval_data) if self.eval_data is not None else work.data
        if data is None:
            if self.goal.asked:
                raise DataError(
                    "an accuracy target needs real data: made-up inputs certify no quantized model",
                    hint="add --eval DATA",
                )
            if work.origin == "generated":
                work.told.note(f"{NOT_CERTIFIED}, which prove no accuracy; give real ones with --data or --eval")
            return
        if self.goal.asked and self.eval_data is None:
            work.told.note("judged on the calibration data, which flatters the result; give others with --eval")
        folder = work.folder / "parent"
        folder.mkdir()
        limit = None if self.goal.asked else self.check_rows or CHECKED_ROWS
        with work.told.step(f"run the parent on {data.source}"):
            self.judge = Judge(
                work.parent.path, work.parent.signature, work.device, data, self.goal, folder, limit=limit
            )

    def _quantize(self, work: Work, config: Config, keep_float: str | None = None) -> tuple[Path, StepResult]:
        """One quantization in a folder of its own."""
        self._trials += 1
        if self._trials > 1 and isinstance(config, StaticConfig):
            config = replace(config, save_calibration=None)  # kept once; nothing is overwritten
        folder = work.folder / f"trial-{self._trials}"
        folder.mkdir()
        place = folder / "model.onnx"
        made = optimize(
            work.parent.path, config, place, check=work.check, open_model=DeviceOpener(work.device), data=work.data,
            progress=work.told, keep_float=folder / keep_float if keep_float else None, cases=work.feeds,
        )  # fmt: skip
        return place, made

    def _reach(self, work: Work) -> tuple[Path, StepResult, Config, list[str], dict[str, Any]]:
        assert self.judge is not None
        bench = _Bench(self, work, self.judge)
        with work.told.step(f"reach {self.goal.describe()}"):
            configs = escalate(work.parent.path, self.config) if self.further else (self.config,)
            found = reach(bench, configs, lambda s: s.describe(self.goal))
        place, made = bench.kept(found.config, found.floats)
        config = with_floats(found.config, found.floats)
        self.score = sha256_of(place), found.score
        notes = [f"{found.score.describe(self.goal)} on {self.judge.data.source}; {found.evaluations} models judged"]
        layers = [
            {"nodes": list(f.nodes), "sqnr_db": _finite(f.sqnr_db), "feeders": list(f.feeders)} for f in found.floats
        ]
        for layer in found.floats:
            reason = f"chosen by target: SQNR {layer.sqnr_db:.1f} dB"
            self.reasons |= dict.fromkeys(layer.nodes, reason)
            notes.append(f"{layer.name} stays in float, {reason}")
        for layer in found.floats:
            feeds = f"feeds {layer.name}, which was chosen by target"
            self.reasons |= {name: feeds for name in layer.feeders if name not in self.reasons}
        extra: dict[str, Any] = {
            "target": self.goal.describe(), "evaluations": found.evaluations,
            "ranked_layers": found.ranked, "float_by_target": layers,
        }  # fmt: skip
        return place, made, config, notes, extra

    def _give_back_slow(
        self, work: Work, place: Path, made: StepResult, config: Config
    ) -> tuple[Path, StepResult, Config, list[str]]:
        """Layers whose int8 kernel is slower return to float, as long as the whole gains by it."""
        device = next((d for d in self.gate.devices if d.runtime == "ort"), None)
        given: list[str] = []
        if device is None or self.gate.seconds <= 0 or work.parent.size_bytes > WHOLE_LIMIT_BYTES:
            return place, made, config, given
        if isinstance(config, HalfConfig):  # its kernels are the parent's
            return place, made, config, given
        feeds, _, _ = benchmark_feeds(work.parent, work.data, 1, work.dims)
        with suppress(DeploykitError):  # whoever cannot run it here is told by the comparison
            if quick_ms(work.parent.path, device, feeds) < SMALLEST_MS:
                return place, made, config, given
            for _ in range(_SLOW_ROUNDS):
                slow = slow_layers(work.parent.path, place, device, feeds[0])
                if not slow:
                    break
                other = replace(config, exclude=(*config.exclude, *(s.name for s in slow)))
                after, result = self._quantize(work, other)
                if not faster_as_a_whole(place, after, self.gate.devices, feeds):
                    break
                place, made, config = after, result, other
                self.reasons |= {s.name: s.reason for s in slow}
                given += [s.name for s in slow]
        return place, made, config, given

    def prove(self, work: Work, target: Path) -> Evidence:
        """Judge, time and look into the model that will be committed.

        Raises:
            AccuracyError: It misses the target, or collapsed.
            SpeedError: It is not faster.
        """
        accuracy = self._certify(work, target)
        speed, gate = prove_speed(work, target, self.gate)
        half = isinstance(self.config, HalfConfig)  # not about integers
        placement = [] if half else [prove_placement(target, device, self.reasons) for device in gate.devices]
        return Evidence(accuracy=accuracy, placement=placement, benchmark=speed)

    def _scored(self, model: Path, judge: Judge) -> tuple[str, Score]:
        """A model's digest and score, judged once."""
        digest = sha256_of(model)
        return self.score if self.score and self.score[0] == digest else (digest, judge.judge(model))

    def _certify(self, work: Work, target: Path) -> list[dict[str, Any]]:
        if self.judge is None:
            made_up = work.origin == "generated"
            reason = NOT_CERTIFIED if made_up else "not certified: no evaluation data"
            reason = reason if self.check_rows else "not certified: not judged"
            return [{"certified": False, "summary": reason}]
        _, score = self._scored(target, self.judge)
        if not score.met:
            what = score.collapsed or f"the target ({self.goal.describe()}) is missed"
            raise AccuracyError(
                f"{what}: {score.describe(self.goal)} on {self.judge.data.source}",
                hint="give more calibration data, or set a target that keeps layers in float: --eval DATA",
            )
        return [self.judge.record(score)]


def prove_speed(work: Work, target: Path, gate: Gate, kind: str = "quantized") -> tuple[list[dict[str, Any]], Gate]:
    """Time the model that will be committed against its parent, and say what does not decide.

    Args:
        work: The step.
        target: The model.
        gate: How speed is judged.
        kind: What the model is called.

    Returns:
        A record a device, and the gate without the devices that have too little memory for it.

    Raises:
        SpeedError: It is not faster.
    """
    feeds, origin, _ = benchmark_feeds(work.parent, work.data, 1, work.dims)
    short = {d: why for d in gate.devices if (why := memory_short(d, work.parent, target))}
    gate = replace(gate, devices=tuple(d for d in gate.devices if d not in short))
    with work.told.step(f"time against the parent in {', '.join(map(str, gate.devices))}"):
        speed = time_against_parent(work.parent, target, gate, feeds, origin)
    speed += [{"device": str(d), "verdict": "not timed", "summary": f"not timed: {why}"} for d, why in short.items()]
    allowed = check_speed(speed, gate, kind)
    silent = [id(r) for r in gate.decisive(speed) if r["verdict"] != "not timed"]
    for note in ([allowed] if allowed else []) + [
        f"{r['device']} {r['summary']}" for r in speed if id(r) not in silent and gate.seconds > 0
    ]:
        work.told.note(note)
    return speed, gate


class _Bench:
    """What `reach` asks for, with files: keeps the models that may still be wanted."""

    def __init__(self, quantizer: Quantizer, work: Work, judge: Judge) -> None:
        self._quantizer = quantizer
        self._work = work
        self._judge = judge
        self._made: dict[tuple[Config, tuple[str, ...]], tuple[Path, StepResult, Score]] = {}

    def judge(self, config: Config, floats: Sequence[LayerError]) -> Score:
        place, made = self._quantizer._quantize(
            self._work, with_floats(config, floats), None if floats else "float.onnx"
        )
        score = self._judge.judge(place)
        self._made[config, _names(floats)] = place, made, score
        self._work.told.advance(len(self._made), None, "models judged")
        self._forget()
        return score

    def rank(self, config: Config) -> list[LayerError]:
        if isinstance(config, HalfConfig):
            return []
        place, made, _ = self._made[config, ()]
        folder = place.parent / "ranking"
        folder.mkdir()
        try:
            return rank_layers(
                place.parent / "float.onnx", made.layered or place, self._judge.batches(_RANKED_ROWS),
                DeviceOpener(self._work.device), folder,
            )  # fmt: skip
        finally:
            shutil.rmtree(folder)

    def kept(self, config: Config, floats: Sequence[LayerError]) -> tuple[Path, StepResult]:
        place, made, _ = self._made[config, _names(floats)]
        return place, made

    def _forget(self) -> None:
        """Remove what can be no result any more: of those with float layers, all but the smallest that reach it."""
        chosen = [key for key, (_, _, score) in self._made.items() if key[1] and score.met]
        smallest = min(chosen, key=lambda key: len(key[1]), default=None)
        for key, (place, _, score) in self._made.items():
            if key[1] and key != smallest and (not score.met or smallest is not None):
                shutil.rmtree(place.parent, ignore_errors=True)


def with_floats(config: Config, floats: Sequence[LayerError]) -> Config:
    """Settings that leave some layers out."""
    return replace(config, exclude=tuple(dict.fromkeys((*config.exclude, *_names(floats)))))


def _names(floats: Sequence[LayerError]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for layer in floats for name in (*layer.nodes, *layer.feeders)))


@dataclass(frozen=True, slots=True)
class DeviceOpener:
    """Opens models on a device; see `SharedOpener`."""

    device: Device

    def __call__(self, path: Path) -> Run:
        return open_session(path, self.device).run

    def shared(self, path: Path) -> Run | None:
        if not self.device.concurrent:
            return None
        return open_session(path, self.device, threads=1).reusing()


def _finite(value: float) -> float | None:
    return round(value, 2) if abs(value) < float("inf") else None
