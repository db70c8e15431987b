"""The verb `optimize`: the best deployment of a model, found by measuring."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.artifact import Artifact, is_artifact
from deploykit.comparing import MIN_COSINE, find_targets
from deploykit.data import Dataset
from deploykit.errors import DataError, OptionError, SearchError
from deploykit.progress import Progress
from deploykit.quantizing import make_goal
from deploykit.recipe_steps import ExportStep
from deploykit.runtimes import Device, Session, open_session
from deploykit.schemes import choose_schemes
from deploykit.search.document import Outcome, fleet_front, fleet_outcomes, machine_rows, sealed_of
from deploykit.search.engine import Search
from deploykit.search.fitting import check_labels
from deploykit.search.output import DOCUMENT, PAGE, RECIPE, REPORT, SETTINGS, Output
from deploykit.search.state import Event, Seat
from deploykit.search.wish import Limits, Wish
from deploykit.targets import parse_targets

if TYPE_CHECKING:
    from deploykit.search.jobs import Executor

EXECUTORS = ("local", "ray")


@dataclass(frozen=True, slots=True)
class Result:
    """What `optimize` found.

    Attributes:
        path: The output directory; it stands for its winner wherever a model is taken.
        document: `optimize.json`.
    """

    path: Path
    document: dict[str, Any]

    @property
    def artifact(self) -> Artifact:
        """The winner."""
        return Artifact.open(self.path / self.document["winner"])

    @property
    def headline(self) -> str:
        """One sentence: what won, by how much, at which accuracy and size."""
        return str(self.document["headline"])

    @property
    def interrupted(self) -> bool:
        """Whether an interrupt ended the search; the best so far is there."""
        return bool(self.document["state"] == "interrupted")

    def open(self) -> Session:
        """The winner in a session, with the settings that were found for it.

        Raises:
            DeploykitError: As `open_session`.
        """
        artifact = self.artifact
        return open_session(artifact, tuned=artifact.path / SETTINGS)


def optimize(
    model: str | Path | Any,
    output: str | Path,
    *,
    example_inputs: Any = None,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    metric: str | None = None,
    max_drop: float | str | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    output_name: str | None = None,
    objective: str = "latency",
    max_latency_ms: float | None = None,
    max_memory_mb: float | None = None,
    max_size_mb: float | None = None,
    devices: Sequence[str | Device] = (),
    batch: int | None = None,
    dims: Mapping[str, int] | None = None,
    contract: Sequence[str] = (),
    schemes: Sequence[str] = (),
    export_options: Mapping[str, Any] | None = None,
    native: bool = True,
    tune: bool = True,
    min_cosine: float = MIN_COSINE,
    shards: int | None = None,
    budget_s: float = 600.0,
    seed: int = 0,
    executor: str | Executor = "local",
    workers: int | None = None,
    cache: str | Path | bool = True,
    fresh: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Result:
    """Find the best deployment of a model on this machine, and prove it.

    Args:
        model: What `export` takes, or an artifact, or a live `torch.nn.Module`.
        output: Directory that receives winner, front and evidence; see `search.output`.
        example_inputs: For a live module, as for `export`.
        data: Calibration data; without them, what needs them is left out.
        eval_data: Real inputs that accuracy is judged on, with `labels` for a metric; `data` by default.
        metric: "accuracy", "f1", "precision" or "recall"; accuracy where `eval_data` are all that is given.
        max_drop: How much of it may be lost: 0.01 in its units (the default), or "1%" of the exported model's value.
        min_sqnr: Smallest ratio of signal to error power of the judged output, in dB.
        min_agreement: Smallest share of rows whose class is the exported model's.
        output_name: The output that is judged; the first [batch, classes] by default.
        objective: "latency" (one request in flight), "throughput", "size", or "cost" (time of a core for a sample).
        max_latency_ms: Most milliseconds that a request may take, in the median.
        max_memory_mb: Most memory of a process that serves it, in 10^6 bytes.
        max_size_mb: Most bytes of model and weights, in 10^6.
        devices: By default the CPU of every installed runtime.
        batch: Samples in a request; None for 1, or, for the objectives throughput and cost, as many as are found best
            where the model takes any number.
        dims: Sizes of dynamic dimensions where inputs are made up.
        contract: Runtimes that have to be able to run the result.
        schemes: Names of quantization schemes to try; the usual ones by default.
        export_options: What else `export` takes ("dynamic", "inputs", "opset", "exporter", "task", "part", ...).
        native: Whether a runtime may compute in less than float32, where the target is kept.
        tune: Whether the runtimes' settings are searched too.
        min_cosine: A candidate whose outputs are further from the exported model's is wrong.
        shards: Parts that calibration is spread over; as many as there are machines by default.
        budget_s: Seconds for all of it.
        seed: Of orders and bootstraps.
        executor: "local": processes of this machine. "ray", or "ray://host:port": a Ray cluster.
        workers: Jobs side by side; by default half as many as cores are allowed.
        cache: Where results of steps are kept; True for the usual place, False for nowhere.
        fresh: Measure anew what was measured earlier.
        resume: Go on in a directory that an interrupted search for the same left.
        progress: Told about phases and notes.
        on_event: Called with every `Event`.

    Returns:
        The result; after an interrupt with the best so far, where there is one.

    Raises:
        SearchError: Nothing keeps what was asked for, or the options do not go together.
        DataError: The data cannot be read, or do not fit.
        OptionError: Options of an export are given for what is exported already.
        OptimizationError: There is no such scheme, or one that was asked for needs data.
        ContractError: There is no such runtime, or no export that it can run.
        OutputExistsError: The output is there, and `resume` is not given.
        DeploykitError: The model cannot be exported, or runs nowhere.
    """
    told, began = progress or Progress(), time.monotonic()
    goal = make_goal(eval_data, metric, max_drop, min_sqnr, min_agreement, output_name)
    targets, named = find_targets(devices)
    for source in (data, eval_data):
        if source is not None:
            Dataset.open(source)  # said now, and not after minutes
    if eval_data is not None:
        check_labels(str(eval_data), goal)
    if goal.asked and data is None and eval_data is None:
        raise DataError("a target needs real data", hint="add --eval DATA or --data DATA")
    parse_targets(contract)
    choose_schemes(schemes, data=data)
    live = not isinstance(model, str | Path)
    export = _export_options(export_options or {})
    if isinstance(model, str | Path):
        if example_inputs is not None:
            raise OptionError(f"example_inputs are given, and {model} has inputs of its own")
        if export and _holds_artifact(Path(model)):
            raise OptionError(f"{model} is exported already, and {next(iter(export))!r} is about an export")
    if named:  # where the export has to be right: all others are compared with it there
        export["devices"] = [str(targets[0])]
    wish = Wish(
        source=type(model).__qualname__ if live else str(model),
        data=None if data is None else str(data),
        eval_data=None if eval_data is None else str(eval_data),
        goal=goal,
        objective=objective,
        limits=Limits(max_latency_ms, max_memory_mb, max_size_mb),
        devices=tuple(map(str, targets)),
        batch=batch,
        dims=dict(dims or {}),
        contract=tuple(contract),
        schemes=tuple(schemes),
        export=export,
        native=native,
        tune=tune,
        min_cosine=min_cosine,
        shards=shards,
        budget_s=budget_s,
        seed=seed,
    )
    wish.check()
    far = isinstance(executor, str) and executor.startswith("ray://")
    if far:
        _refuse_functions(wish)
    with ExitStack() as stack:
        out = stack.enter_context(Output(output, wish.as_dict(), resume=resume))
        doer = stack.enter_context(_executor(executor, workers, cache, fresh, told))
        return _search(_with_model(wish, model, example_inputs, out, told, far=far), out, doer, told, on_event, began)


def _export_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check what `[export]` is told besides.

    Raises:
        SearchError: It has no such key.
    """
    ours = {"step", "source", "data", "dims", "contract", "devices"}
    known = [name for name in ExportStep.model_fields if name not in ours]
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise SearchError(f"export takes no option {unknown!r}", expected=", ".join(known))
    return {k: v for k, v in given.items() if v not in (None, (), [])}


def _refuse_functions(wish: Wish) -> None:
    """Datasets travel to other machines as files.

    Raises:
        SearchError: A function gives one.
    """
    for option, source in (("--data", wish.data), ("--eval", wish.eval_data)):
        if source is not None and not Path(source).exists():
            raise SearchError(
                f"{option} {source} cannot travel to another machine", expected="a file or a directory",
                hint="write what it gives to a .npz file",
            )  # fmt: skip


def _with_model(wish: Wish, model: Any, example_inputs: Any, out: Output, told: Progress, *, far: bool) -> Wish:
    """The artifact to start from, where the source is one, or is what no other process can export.

    That is a live module; and where the jobs are done far away, a factory.
    """
    from dataclasses import replace

    from deploykit.exporting import export

    if isinstance(model, str | Path):
        if _holds_artifact(Path(model)):
            return replace(wish, model=str(Artifact.open(model).path))
        if not far or Path(model).exists():
            return wish
    made = export(
        model, out.source(), example_inputs=example_inputs, data=wish.data, contract=wish.contract, dims=wish.dims,
        progress=told, **wish.export,
    )  # fmt: skip
    return replace(wish, model=str(made.path))


def _holds_artifact(path: Path) -> bool:
    return is_artifact(path) or (path / DOCUMENT).is_file()


def _executor(kind: str | Executor, workers: int | None, cache: str | Path | bool, fresh: bool, told: Progress) -> Any:
    """Who does the jobs, with what was done already."""
    found: Executor
    if not isinstance(kind, str):
        found = kind
    elif kind == "local":
        from deploykit.search.executor import LocalExecutor

        found = LocalExecutor(workers, progress=_Notes(told))
    elif kind == "ray" or kind.startswith("ray://"):
        from deploykit.search.ray_executor import RayExecutor

        found = RayExecutor(None if kind == "ray" else kind, workers=workers, progress=_Notes(told))
    else:
        raise SearchError(f"unknown executor {kind!r}", expected="local, ray or ray://HOST:PORT")
    if cache is False:
        return found
    from deploykit.search.cache import Cache, CachedExecutor

    return CachedExecutor(found, Cache(None if cache is True else Path(cache), progress=told), fresh=fresh)


class _Notes(Progress):
    """Passes on what the user must know, and leaves out the steps of each job: a search has hundreds."""

    def __init__(self, told: Progress) -> None:
        super().__init__()
        self._told = told

    def note(self, text: str) -> None:
        """Once; what is said of one variant is often said of the next."""
        if text not in self.notes:
            super().note(text)
            self._told.note(text)


def _search(
    wish: Wish,
    out: Output,
    executor: Executor,
    told: Progress,
    on_event: Callable[[Event], None] | None,
    began: float,
) -> Result:
    state = "done"

    def best(seat: Seat) -> None:
        path = search.variants[seat.place.model].path
        assert path is not None
        from deploykit.artifact import sha256_of

        settings = seat.best_place.settings_for(sha256_of(Artifact.open(path).model_path), search.timing.machine)
        sealed = sealed_of(seat, search, settings, seat.place.model)
        out.publish_interim(sealed, {"headline": f"best so far: {seat.best_place.label}", "spent_s": search.spent_s()})

    search = Search(
        wish, executor, out.scratch, told, run=out.run, on_best=best, on_event=on_event or (lambda event: None),
        began=began,
    )  # fmt: skip
    try:
        search.go()
    except KeyboardInterrupt:
        if not search.timing.order():
            raise
        state = "interrupted"
        told.note("interrupted: the best so far is kept; --resume goes on")
    except SearchError:
        if search.seats:  # the exported model runs nowhere
            out.abandon()
        raise
    try:
        outcome = Outcome(search, state)
    except SearchError:
        out.abandon()  # the best so far had not been measured yet
        raise
    others = fleet_outcomes(search)
    document = outcome.document(search, machine_rows(search, outcome, others))
    recipe, report = outcome.recipe(search), search.timing.report
    files = {} if recipe is None else {RECIPE: recipe.encode()}
    if report is not None:
        files[REPORT] = (json.dumps(report, indent=1) + "\n").encode()
    files[PAGE] = _page(out.whole(document), report, recipe).encode()
    front = [outcome.sealed(s) for s in outcome.front] + fleet_front(others)
    out.publish(front, outcome.name_of(outcome.winner), document, files)
    return Result(out.path, {**json.loads((out.path / DOCUMENT).read_text(encoding="utf-8"))})


def _page(document: Mapping[str, Any], report: Mapping[str, Any] | None, recipe: str | None) -> str:
    from deploykit.benchmarks import Report
    from deploykit.search.page import to_html

    return to_html(document, Report(dict(report)) if report is not None else None, recipe)
