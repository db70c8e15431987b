"""The verb `benchmark`: models × devices, measured as they are, or with settings that are searched first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.candidates import candidate_devices, enters
from deploykit.comparing import MIN_COSINE
from deploykit.data import Dataset
from deploykit.errors import BenchmarkError
from deploykit.models import LoadedModel, benchmark_feeds, load_candidate, names_of
from deploykit.progress import Progress
from deploykit.runtimes import Device
from deploykit.staging import check_free, check_writable
from deploykit.tuning import Tuner, save_winner, tuned_candidates

if TYPE_CHECKING:
    from deploykit.benchmarks import Report


def benchmark(
    models: Sequence[str | Path],
    *,
    devices: Sequence[str | Device] = (),
    data: str | Path | None = None,
    scenario: str = "latency",
    threads: int | None = None,
    batch: int = 1,
    concurrency: int | None = None,
    slo_p99_ms: float | None = None,
    rounds: int = 5,
    seconds: float = 2.0,
    warmup_s: float = 1.0,
    precision: str = "fp32",
    dims: Mapping[str, int] | None = None,
    max_drop: float = 0.01,
    min_cosine: float = MIN_COSINE,
    confirm: bool = True,
    tune: bool = False,
    budget_s: float = 120.0,
    tuned: Sequence[str | Path] = (),
    save_settings: str | Path | None = None,
    explain: bool = False,
    seed: int = 0,
    journal: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure models × devices in interleaved rounds, each in a fresh process.

    Args:
        models: Artifacts, `.onnx` or `.xml` files, and `.pt2` programs for PyTorch's devices; the first, on the first
            device that reads it, is the reference.
        devices: By default the CPU of every installed runtime, and of PyTorch where a model is a `.pt2` program.
        data: Inputs; with `labels`, accuracy is measured too.
        scenario: "latency": one request in flight. "offline": as many as give the highest throughput. "server":
            requests come at random times, and the highest rate counts whose p99 meets ``slo_p99_ms``.
        threads: Threads in one request; all allowed cores by default.
        batch: Samples in one request.
        concurrency: Requests in flight in "offline" and "server"; found out by default.
        slo_p99_ms: Milliseconds, from a request's intended start, that 99 of 100 have to be answered in.
        rounds: At least 3; the confidence intervals are over rounds.
        seconds: Timed seconds a candidate and round.
        warmup_s: Warm-up seconds before them (and at least 10 requests, 3 of them in every lane).
        precision: "fp32" or "native", see `open_session`.
        dims: Sizes of dynamic dimensions where inputs are made up.
        max_drop: A candidate whose accuracy is lower than the reference's by more does not win.
        min_cosine: A candidate whose outputs are further from the reference's does not enter.
        confirm: Whether the best three of three or more are measured once more, on new rounds, and those decide.
        tune: Search the runtime's settings of every model and device first, and measure the best beside the defaults:
            for latency, or in the scenario "offline" for throughput, there with the batch too where one model is
            measured on one device.
        budget_s: Seconds for all of it with ``tune``; rounds and seconds are cut to what is left of them.
        tuned: Settings files that ``save_settings`` wrote; every model is measured with each of its device.
        save_settings: File for the settings of the winner; must not exist.
        explain: Profile each candidate afterwards and say why it is slow; see `deploykit.explaining`.
        seed: Of the order of the candidates and of the bootstrap.
        journal: File that keeps finished rounds until all are done.
        resume: Go on with what the journal holds.
        progress: Told about steps.

    Raises:
        BenchmarkError: Nothing could be measured.
        DeviceError: A device cannot be had.
        OutputExistsError: The file for the settings is there.
    """
    from deploykit.benchmarks import Candidate, Settings, measure
    from deploykit.explaining import cure_of, explain_candidates

    if tune and (journal is not None or resume):
        raise BenchmarkError("a search cannot be resumed", expected="a measurement without tune")
    told = progress or Progress()
    loaded = [load_candidate(m) for m in models]
    targets = candidate_devices(loaded, devices)
    dataset = Dataset.open(data) if data else None
    if not loaded:
        raise BenchmarkError("nothing to measure", hint="name a model: -m MODEL")
    feeds, origin, size = benchmark_feeds(loaded[0], dataset, batch, dims or {})
    if size != batch:
        told.note(f"the model's batch is fixed to {size}")
    candidates = [
        Candidate(name, str(model.path), str(device), model.digest, model.size_bytes)
        for name, model in zip(names_of(models), loaded, strict=True)
        for device in targets
        if enters(model.path, device, named=bool(devices))
    ]
    settings = Settings(
        rounds=rounds, seconds=seconds, warmup_s=warmup_s, threads=threads, batch=size, precision=precision,
        max_drop=max_drop, min_cosine=min_cosine, seed=seed, inputs=origin, scenario=scenario,
        concurrency=concurrency, slo_p99_ms=slo_p99_ms, confirm=confirm,
    )  # fmt: skip
    settings.check()
    candidates += tuned_candidates(candidates, tuned, size, told)
    kept = Path(save_settings) if save_settings is not None else None
    if kept is not None:
        check_free(kept)
        check_writable(kept.parent)
    try:
        if tune:
            tuner = Tuner(candidates, settings, lambda n: benchmark_feeds(loaded[0], dataset, n, dims or {})[0], told)
            report, candidates = tuner.run(dataset, budget_s, _takes_batches(loaded[0]))
        else:
            report = measure(candidates, feeds, settings, data=dataset, progress=told, journal=journal, resume=resume)
    except BenchmarkError as exc:
        if not explain or not exc.what.startswith(f"the reference {candidates[0].label} does not run"):
            raise
        found = explain_candidates(candidates[:1], ["failed"], feeds, threads=threads, precision=precision)
        raise BenchmarkError(
            exc.what, expected=exc.expected, hint=next(map(cure_of, found.values()), None) or exc.hint
        ) from exc
    if kept is not None and not report.interrupted:
        save_winner(report, candidates, kept, told)
        report.data["notes"] = list(told.notes)
    if explain and not report.interrupted:
        measured = report.data.get("settings", {}).get("batch", size)
        if measured != size:  # the tuner chose another
            feeds = benchmark_feeds(loaded[0], dataset, measured, dims or {})[0]
        statuses = [entry["status"] for entry in report.candidates]
        report.data["explain"] = explain_candidates(
            candidates, statuses, feeds, threads=threads, precision=precision, progress=told
        )
    return report


def _takes_batches(model: LoadedModel) -> bool:
    firsts = [s.shape[0] for s in model.signature.inputs if s.shape]
    return bool(firsts) and not any(isinstance(d, int) for d in firsts)
