"""The verb `prune`: a torch module with fewer channels, or with zeros, trained again, exported, and proved."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifact import TORCH, Artifact, Evidence, StepRecord
from deploykit.comparing import find_targets
from deploykit.data import LABELS, Dataset
from deploykit.errors import AccuracyError, OptimizationError, SpeedError
from deploykit.exporters import ExportOptions
from deploykit.exporters.base import DEFAULT_OPSET
from deploykit.exporters.live import undisturbed
from deploykit.extras import require
from deploykit.gating import DEFAULT_SECONDS, MORE_ROUNDS, Gate, check_speed, time_against_parent, time_on
from deploykit.goals import Goal, Judge, Score, read_drop
from deploykit.graph_exporting import MODEL, export_graph
from deploykit.latency import Stopwatch
from deploykit.optimizers.pruning import (
    Aim,
    Masks,
    Probe,
    Progressed,
    PruneConfig,
    Subject,
    attributes_of,
    check_keep,
    make_sparse,
    prune_structured,
    refuse_recurrent,
)
from deploykit.optimizers.pruning.sparse import NOTE
from deploykit.optimizers.training import Supervised, TrainConfig, first_output, train
from deploykit.optimizers.training.config import LOSS
from deploykit.optimizers.training.losses import CLASSIFIERS, are_probabilities
from deploykit.optimizers.training.outputs import tensors_of
from deploykit.progress import Progress, quiet
from deploykit.prune_folder import PruneFolder
from deploykit.prune_request import TOLERANCE, SpeedTarget, check_request
from deploykit.pruned import restore, sparse_params, structured_params, tools_used, write_torch
from deploykit.runtimes import Device
from deploykit.staging import ArtifactWriter, check_free
from deploykit.targets import Target, choose_opset, parse_targets
from deploykit.trainable import Trainable, find_score, open_trainable, work_folder

__all__ = ["prune", "restore"]

_LOG = "export.log"
_WORK = ".work"
# Rows that the sensitivity of the groups, and the gradient, are measured on.
_ROWS, _BATCH = 128, 32
# Rows that are read at once, to find those.
_READ = 256
# What of a step is kept as it is.
_KEPT = ("ratio", "changed", "weights", "sensitivity")


def prune(
    source: str | Path | Any,
    output: str | Path,
    example_inputs: Any = None,
    *,
    config: PruneConfig | None = None,
    speedup: float | None = None,
    latency_ms: float | None = None,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    training: TrainConfig | None = None,
    metric: str | None = None,
    max_drop: float | str | None = None,
    devices: Sequence[str | Device] = (),
    allow_slower: bool = False,
    gate_seconds: float = DEFAULT_SECONDS,
    resume: bool = False,
    dynamic: Sequence[str] = (),
    inputs: Sequence[str] = (),
    dims: Mapping[str, int] | None = None,
    opset: int | None = None,
    exporter: str = "auto",
    timeout_s: float | None = None,
    task: str | None = None,
    part: str | None = None,
    contract: Sequence[str] = (),
    allow_unverified: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Prune a torch module, train it again, and export it.

    Structured pruning takes channels, attention heads and neurons out, so that every runtime is faster; how much, is
    given as a share, or found by exporting and timing pruned copies in the runtime on the way. The methods that set
    weights to zero keep every shape. The result is compared with the pruned module as `export` compares, and timed
    against the module as it was. What it can be trained on from stands beside it in the artifact's `torch/`: weights,
    structure (see `restore`), and a program of `torch.export`.

    Where it trains, a folder beside the output, `OUTPUT.training`, holds how far it is. After a crash, an interrupt, or
    an error behind the training (a target that was missed on a busy machine), ``resume`` goes on with it; it goes when
    the artifact stands.

    Args:
        source: `file.py:factory`, `package.module:factory` or a Hugging Face model directory; or a torch module of this
            process, of which a copy is taken.
        output: Where the artifact will stand.
        example_inputs: Of a module in this process; see `export`.
        config: How it is pruned.
        speedup: Times as fast as the module as it is, on the first device; in place of a ratio.
        latency_ms: Milliseconds a request there; in place of a ratio.
        data: Training data with `labels`, for the recovery, the importance of channels, and the inputs that are timed.
        eval_data: Data with `labels` that the metric is measured on, before and after; never trained on.
        training: How each recovery is trained; None for none.
        metric: On `eval_data`; accuracy by default.
        max_drop: How much of the metric may be lost: 0.01 in its units, or "1%"; None to record the loss alone.
        devices: Where it is exported for and timed; by default the CPU of every installed runtime, where the first one
            decides about a speed-up or a latency.
        allow_slower: Keep a result that is not faster, or that misses its target; the evidence says so.
        gate_seconds: Timed seconds of the proof; 0 for none.
        resume: Go on with the pruning beside the output, where there is one.
        dynamic: See `export`.
        inputs: See `export`.
        dims: See `export`.
        opset: See `export`.
        exporter: See `export`.
        timeout_s: See `export`.
        task: See `export`.
        part: See `export`.
        contract: See `export`.
        allow_unverified: See `export`.
        progress: Told about steps and notes.

    Raises:
        SourceError: The source cannot be loaded, or is no torch module.
        OptimizationError: It cannot be pruned (a recurrent layer), or not as much as is asked for.
        SpeedError: The target is out of reach, or the result is not faster.
        AccuracyError: It loses more than `max_drop`.
        DataError: The data do not fit.
        ExportError: No way leads to ONNX.
        ParityError: The exported graph gave other numbers than the pruned module.
        OutputExistsError: The output is taken, or a pruning is beside it and ``resume`` is not given.
        KeyboardInterrupt: Interrupted; how far it was is kept.
    """
    asked, target = config or PruneConfig(), SpeedTarget(speedup, latency_ms)
    check_request(asked, target, data, eval_data, training, metric, max_drop, gate_seconds)
    check_free(Path(output))
    folder = PruneFolder(work_folder(Path(output))) if training is not None else None
    if folder is not None:
        folder.check(resume=resume)
    elif resume:
        raise OptimizationError("nothing to go on with: there is no training", hint="leave --resume out")
    targets, held = find_targets(devices), parse_targets(contract)
    # What is timed on the way is written for the contracts, like the result.
    opset = choose_opset(held, opset, DEFAULT_OPSET)
    require("torch", extra="prune")
    if asked.method == "structured":
        require("torch_pruning", extra="prune")
    options = ExportOptions(
        tuple(inputs), tuple(dynamic), opset, exporter, dict(dims or {}), None, task, part, timeout_s
    )
    gate = Gate(targets[0], targets[1], target.asked, allow_slower, seconds=gate_seconds)
    told = progress or Progress()
    job = _Job(asked, target, training, metric or "accuracy", max_drop, gate, options, held, folder, told)
    try:
        with undisturbed():
            artifact = job.run(
                source, example_inputs, Path(output), targets, data, eval_data, unverified=allow_unverified
            )
    except BaseException:
        if folder is not None:
            folder.leave(told)
        raise
    if folder is not None:
        folder.discard()
    return artifact


@dataclass(frozen=True, slots=True)
class _Job:
    """What is asked for, and the steps that do it."""

    config: PruneConfig
    target: SpeedTarget
    training: TrainConfig | None
    metric: str
    max_drop: float | str | None
    gate: Gate
    options: ExportOptions
    held: Sequence[Target]
    folder: PruneFolder | None
    told: Progress

    def run(
        self,
        given: Any,
        examples: Any,
        output: Path,
        targets: tuple[Sequence[Device], bool],
        data: str | Path | None,
        eval_data: str | Path | None,
        *,
        unverified: bool,
    ) -> Artifact:
        """Prune, train, export, prove, commit."""
        told, started, first_note = self.told, time.monotonic(), len(self.told.notes)
        with ArtifactWriter(output) as writer:
            log, work = writer.dir / _LOG, writer.dir / _WORK
            work.mkdir()
            with told.step(f"load {given}" if isinstance(given, str | Path) else "load the module"), quiet(log):
                model = open_trainable(given, examples, self.options)
            check_keep(model.module, self.config.keep)
            if self.config.method == "structured":
                refuse_recurrent(model.module, self.config.keep)
            source = model.source
            rows = None if data is None else model.fit(Dataset.open(data))
            held_out = None if eval_data is None else model.fit(Dataset.open(eval_data))
            timed = self.gate.seconds > 0 or held_out is not None
            watch = Stopwatch(source, work, log, rows, told, self.held) if timed else None
            judge = self._judge(watch, targets[0][0], held_out, work)
            before = attributes_of(model.module)
            done = self._prune(model, rows, held_out, watch, self._params(data, eval_data))
            source.observe()
            exported = export_graph(
                source, writer.dir, model.label, self.options, targets, self.held, time.monotonic(), told,
                unverified=unverified,
            )  # fmt: skip
            speed = self._time(watch, writer.dir / MODEL)
            accuracy = self._score(judge, writer.dir / MODEL)
            write_torch(source, writer.dir / TORCH, before, log, told)
            shutil.rmtree(work)
            if log.is_file() and not log.stat().st_size:
                log.unlink()
            step = StepRecord(
                step="prune",
                params={"source": model.label, "kind": source.kind, **self._params(data, eval_data), **done},
                tools=tools_used(),
                parent=None,
                seconds=round(time.monotonic() - started, 3),
                notes=list(told.notes[first_note:]),
            )
            return writer.commit(
                model=MODEL,
                signature=exported.signature,
                lineage=[step, exported.step],
                evidence=Evidence(parity=exported.parity, accuracy=accuracy, benchmark=speed),
                ranges=source.ranges,
            )

    def _judge(self, watch: Stopwatch | None, device: Device, data: Dataset | None, work: Path) -> Judge | None:
        """What the module as it is gives on the evaluation data."""
        if data is None or watch is None:
            self.told.note("accuracy is not measured: there are no evaluation data (--eval)")
            return None
        folder = work / "judge"
        folder.mkdir()
        goal = Goal(self.metric, *read_drop(0.0 if self.max_drop is None else self.max_drop))
        with self.told.step(f"measure {self.metric} before"):
            return Judge(watch.original.path, watch.original.signature, device, data, goal, folder)

    def _prune(
        self,
        model: Trainable,
        rows: Dataset | None,
        held_out: Dataset | None,
        watch: Stopwatch | None,
        plan: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Prune the source's module in place; what the lineage keeps of it."""
        folder = self.folder
        begun = None if folder is None else folder.begin({"source": model.label, **plan}, model.module)
        metrics: list[float | None] = [] if begun is None else list(begun["recovered"])
        if begun is not None:
            self.told.note(f"the pruning goes on with the training of step {begun['step']} of {self.config.steps}")

        def recover(module: Any, step: int, hold: Callable[..., None] | None = None) -> None:
            assert rows is not None and self.training is not None and folder is not None
            config = replace(self.training, metric=LOSS if held_out is None else self.metric)
            trained = train(
                module, rows, config, folder.recovery(step), eval_data=held_out,
                score=None if held_out is None else find_score(self.metric), feed=model.feed, after_step=hold,
                resume=True, progress=self.told,
            )  # fmt: skip
            metrics.append(trained.metric)

        if self.training is None:
            self.told.note("the weights are not trained again after the pruning; accuracy is likely to be lost")
        again = recover if self.training is not None else None
        if self.config.method != "structured":
            masks = make_sparse(model.module, self.config, again, **self._steps_of_zeros(model.module, begun, metrics))
            self.told.note(NOTE)
            return {**sparse_params(masks, model.module), "recovered": metrics}
        examples = tensors_of(model.source.examples, "cpu")
        # The smallest of those that the export is compared on.
        cases = [case.feeds for case in model.source.cases[1:]]
        others = [tensors_of(min(cases, key=lambda feeds: sum(a.size for a in feeds.values())), "cpu")] if cases else []
        subject = Subject(model.module, examples, model.feed, self.config.keep, tuple(others))
        sample = [] if rows is None else _sample(rows)
        done = prune_structured(
            subject, self.config, aim=self._aim(watch), losses=self._losses(sample, model.feed),
            batches=[{name: batch[name] for name in model.names} for batch in sample], recover=again, told=self.told,
            **self._steps_of_channels(begun, metrics),
        )  # fmt: skip
        return {**structured_params(done), "recovered": metrics}

    def _steps_of_zeros(self, module: Any, begun: Mapping[str, Any] | None, metrics: list[Any]) -> dict[str, Any]:
        """What `make_sparse` goes on from, and what keeps its steps."""
        folder = self.folder
        if folder is None:
            return {}
        if begun is not None:
            module.load_state_dict(begun["weights"])

        def keep(step: int, masks: Masks) -> None:
            state = {"weights": module.state_dict(), "masks": dict(masks.kept), "recovered": list(metrics)}
            folder.keep(step, state)

        return {"keep": keep, "begun": None if begun is None else (begun["step"], begun["masks"])}

    def _steps_of_channels(self, begun: Mapping[str, Any] | None, metrics: list[Any]) -> dict[str, Any]:
        """What `prune_structured` goes on from, and what keeps its steps."""
        folder = self.folder
        if folder is None:
            return {}

        def keep(now: Progressed) -> None:
            state = {name: getattr(now, name) for name in _KEPT}
            probes = [(probe.ratio, probe.ms) for probe in now.probes]
            folder.keep(now.step, {**state, "probes": probes, "recovered": list(metrics)})

        if begun is None:
            return {"keep": keep}
        told = {name: begun[name] for name in _KEPT}
        probes = tuple(Probe(ratio, ms) for ratio, ms in begun["probes"])
        return {"keep": keep, "begun": Progressed(step=begun["step"], probes=probes, **told)}

    def _aim(self, watch: Stopwatch | None) -> Aim | None:
        if not self.target.asked or watch is None:
            return None
        absolute = self.target.latency_ms is not None
        with self.told.step("time the module as it is"):
            start = watch.begin(self.gate, absolute=absolute)
        wanted = self.target.latency_ms if self.target.latency_ms is not None else start / (self.target.speedup or 1.0)
        return Aim(wanted, start, watch.measure, watch.confirm, TOLERANCE, required=not self.gate.allow_slower)

    def _losses(self, sample: Sequence[Mapping[str, Any]], feed: Any) -> Any:
        """Losses on some labelled batches, for importance by Taylor expansion; None without labels."""
        labels = sample[0].get(LABELS) if sample else None
        if labels is None or (self.training is None and labels.is_floating_point()):
            return None
        config = replace(self.training or TrainConfig(), mixup=0.0)

        def losses(module: Any) -> Iterator[Any]:
            objective = Supervised(config, feed)
            for batch in sample:
                if config.loss in CLASSIFIERS:
                    objective.probabilities = are_probabilities(first_output(feed(module, batch)).detach())
                yield objective(module, batch)["loss"]

        return losses

    def _time(self, watch: Stopwatch | None, model: Path) -> list[dict[str, Any]]:
        """Time the result against the module as it was.

        Raises:
            SpeedError: It is not faster, or misses the target, and that was not allowed.
        """
        if watch is None or self.gate.seconds <= 0:
            self.told.note("whether it is faster is not measured: --gate-seconds 0")
            return []
        with self.told.step("time it against the module as it was"):
            records = time_against_parent(watch.original, model, self.gate, watch.feeds, watch.origin)
        if self.config.method != "structured":
            # Nobody said that zeros are faster.
            return records
        if self.target.asked:
            if "ratio" in records[0] and self.target.unclear(records[0]):
                with self.told.step("time it again, in more rounds, because noise may hide the target"):
                    records[0] = time_on(
                        self.gate.devices[0], watch.original, model, self.gate, watch.feeds, watch.origin, MORE_ROUNDS
                    )
            first = records[0]
            met = "ratio" in first and self.target.reached(first)
            word = "met" if met else "missed"
            first |= {"target": self.target.describe(), "target_met": met}
            if "ratio" in first:
                off = self.target.off(first)
                first["target_off"] = round(off, 4)
                word += f", {abs(off):.1%} {'faster' if off >= 0 else 'slower'} than asked for"
            first["summary"] += f"; target {self.target.describe()} {word}"
            if not met and not self.gate.allow_slower:
                raise SpeedError(
                    f"the target {self.target.describe()} is missed: {first['device']} {first['summary']}",
                    expected="within 5 % of it",
                    hint="run it again on a machine that is idle, ask for less, or keep it: --allow-slower",
                )
        allowed = check_speed(records, self.gate, "pruned")
        if allowed:
            self.told.note(allowed)
        return records

    def _score(self, judge: Judge | None, model: Path) -> list[dict[str, Any]]:
        """The metric before and after.

        Raises:
            AccuracyError: More is lost than may be.
        """
        if judge is None:
            return []
        with self.told.step(f"measure {self.metric} after"):
            score: Score = judge.judge(model)
        told = f"{self.metric} {score.reference:.4f} before, {score.value:.4f} after"
        if self.max_drop is not None and not score.met:
            raise AccuracyError(
                f"the pruned model loses too much: {told}{f', {score.collapsed}' if score.collapsed else ''}",
                expected=judge.goal.describe(),
                hint="train longer (--epochs), in more steps (--steps), prune less, or allow more: --max-drop",
            )
        record = judge.record(score)
        certified = self.max_drop is not None
        summary = f"{told} on {judge.data.source} ({score.samples} samples)"
        if score.collapsed:
            summary += f"; {score.collapsed}"
        wanted = record["target"] if certified else None
        return [record | {"certified": certified, "target": wanted, "summary": summary}]

    def _params(self, data: Any, eval_data: Any) -> dict[str, Any]:
        return {
            **{key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.config).items()},
            "asked_ratio": self.config.ratio, "speedup": self.target.speedup, "latency_ms": self.target.latency_ms,
            "data": None if data is None else str(data), "eval_data": None if eval_data is None else str(eval_data),
            "training": None if self.training is None else asdict(self.training),
        }  # fmt: skip


def _sample(rows: Dataset) -> list[dict[str, Any]]:
    """Some rows as tensors, in batches, from all over the data: their first rows are often of one class alone."""
    if rows.length is None or rows.length <= _ROWS:
        found = rows.head(_ROWS)
    else:
        parts = list(rows.take([rows.length * i // _ROWS for i in range(_ROWS)], _READ))
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    count = len(next(iter(found.values())))
    return [
        tensors_of({name: array[start : start + _BATCH] for name, array in found.items()}, "cpu")
        for start in range(0, count, _BATCH)
    ]
