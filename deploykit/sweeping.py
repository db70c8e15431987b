"""The verb `quantize_sweep`: one model in many schemes, measured side by side.

Each scheme makes an artifact as its own command would, without timing it. What came out right is then judged on the
data in each runtime, looked into, and timed in one interleaved run, together with the parent and, where a CPU computes
in bfloat16, the parent in what OpenVINO makes of it by itself: an 8-bit model has to beat that too.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact, is_artifact, stamp_of
from deploykit.benchmarks import Candidate, Report, Settings, measure
from deploykit.comparing import MIN_COSINE, find_targets
from deploykit.data import Dataset
from deploykit.errors import (
    DataError,
    DeploykitError,
    InferenceError,
    OptimizationError,
    OutputExistsError,
    StorageError,
    storage_error,
)
from deploykit.goals import Goal, Judge
from deploykit.machine import inspect_machine
from deploykit.models import LoadedModel, benchmark_feeds, load_model
from deploykit.progress import Progress
from deploykit.proof import prove_placement
from deploykit.quantizing import make_goal
from deploykit.runtimes import Device
from deploykit.schemes import SCHEMES, choose_schemes
from deploykit.staging import check_free, write_file

REPORT = "sweep.json"
PARENT, NATIVE = "parent", "parent-native"
SCHEMA_VERSION = 1
_RECORD = ".sweep.json"
# What is further from the parent than this is not worth timing.
_TIMED_COSINE = 0.9
# Warming up is no longer than what is timed after it.
_WARMUP_S = 1.0
# Without labels, rows that a model is compared with its parent on.
_ROWS = 256
# What of a judge's record goes into a row.
_KEPT = ("samples", "sqnr_db", "agreement", "metric", "value", "parent")


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep found.

    Attributes:
        data: The JSON document: "rows", one a scheme, "notes", and the whole "benchmark".
    """

    data: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One entry a scheme, the parent first."""
        found: list[dict[str, Any]] = self.data["rows"]
        return found

    @property
    def interrupted(self) -> bool:
        """Whether an interrupt ended the measurement before all rounds were done."""
        return bool(self.data["benchmark"].get("interrupted"))

    def to_json(self) -> str:
        """The JSON document as text."""
        return json.dumps(self.data, indent=1) + "\n"


def quantize_sweep(
    model: str | Path,
    output: str | Path,
    *,
    data: str | Path | None = None,
    schemes: Sequence[str] = (),
    eval_data: str | Path | None = None,
    metric: str | None = None,
    max_drop: float | str | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    output_name: str | None = None,
    devices: Sequence[str | Device] = (),
    dims: Mapping[str, int] | None = None,
    min_cosine: float = MIN_COSINE,
    contract: Sequence[str] = (),
    batch: int = 1,
    rounds: int = 5,
    seconds: float = 1.0,
    resume: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Try schemes, and measure accuracy, speed, size and placement of each.

    Args:
        model: Artifact or `.onnx` file, in floating point.
        output: Directory that receives an artifact a scheme, and `sweep.json`.
        data: Calibration data; without them, what needs them is left out.
        schemes: Names of `schemes.SCHEMES`; the usual ones by default.
        eval_data: Real inputs, with `labels` for a metric; `data` by default.
        metric: "accuracy", "f1", "precision", "recall" or a plugin's; accuracy where `eval_data` are all that is given.
        max_drop: How much of it may be lost: 0.01 in its units (the default), or "1%" of the parent's value.
        min_sqnr: Smallest ratio of signal to error power of the judged output, in dB.
        min_agreement: Smallest share of rows whose class is the parent's.
        output_name: The output that is judged; the first [batch, classes] by default.
        devices: Where; by default the CPU of every installed runtime. The first is what speed is compared with.
        dims: Sizes of dynamic dimensions where inputs are made up.
        min_cosine: A scheme whose outputs are further from the parent's fails.
        contract: Runtimes that have to be able to run each result.
        batch: Samples in one timed request.
        rounds: At least 3; the confidence intervals are over rounds.
        seconds: Timed seconds a model, device and round, after a warm-up as long, of one second at most.
        resume: Go on in a directory that an interrupted sweep of the same model and data left.
        progress: Told about steps and notes.

    Raises:
        OptimizationError: Unknown schemes, or none could be made.
        DataError: The data cannot be read, or do not fit.
        OutputExistsError: The output is there, and `resume` is not given.
    """
    told = progress or Progress()
    names, left = choose_schemes(schemes, data=data)
    goal = make_goal(eval_data, metric, max_drop, min_sqnr, min_agreement, output_name)
    targets, _ = find_targets(devices)
    parent = load_model(model)
    judged_on = eval_data if eval_data is not None else data
    dataset = Dataset.open(judged_on) if judged_on is not None else None
    if dataset is None and goal.asked:
        raise DataError("a target needs real data", hint="add --eval DATA or --data DATA")
    feeds, origin, size = benchmark_feeds(parent, dataset, batch, dims or {})
    settings = Settings(
        rounds=rounds,
        seconds=seconds,
        warmup_s=min(_WARMUP_S, seconds),
        batch=size,
        min_cosine=min(min_cosine, _TIMED_COSINE),
        max_drop=1.0,
        inputs=origin,
    )
    settings.check()
    record = {
        "model": parent.digest, "data": _stamp(data), "dims": dict(dims or {}),
        "devices": [str(d) for d in targets], "contract": list(contract), "min_cosine": min_cosine,
    }  # fmt: skip
    folder = _open_output(Path(output), record, resume=resume)
    given = {
        "data": data, "dims": dims, "min_cosine": min_cosine, "contract": contract, "devices": devices,
        "allow_slower": True, "gate_seconds": 0, "progress": told,
    }  # fmt: skip
    made: dict[str, Path] = {}
    try:
        for name in names:
            _make(name, model, folder, given, made, left)
        if not made:
            raise OptimizationError(
                "no scheme could be applied: " + "; ".join(f"{n}: {why}" for n, why in left.items()),
                hint="keep the model in floating point",
            )
    except BaseException:
        if not made:
            shutil.rmtree(folder)
        raise
    models = {PARENT: parent, **{name: load_model(path) for name, path in made.items()}}
    rows = [_row(name, loaded) for name, loaded in models.items()]
    native = [d for d in targets if d.runtime == "openvino" and inspect_machine().flags.get("bf16")]
    candidates = [
        Candidate(name, str(loaded.path), str(device), loaded.digest, loaded.size_bytes)
        for name, loaded in models.items()
        for device in targets
    ]
    candidates += [
        Candidate(NATIVE, str(parent.path), str(d), parent.digest, parent.size_bytes, precision="native")
        for d in native
    ]
    report = measure(candidates, feeds, settings, data=None, progress=told)
    if native:
        rows.append(_row(NATIVE, parent))
    _add_speed(rows, report)
    with told.step(f"judge {len(rows)} models on {dataset.source if dataset else 'no data'}"):
        if dataset is not None:
            for device in targets:
                _add_quality(rows, parent, device, dataset, goal, told)
        for row in rows[1:]:
            if row["scheme"] in made and not row["scheme"].startswith(("fp16", "bf16")):
                row["placement"] = {str(d): prove_placement(Path(row["model"]), d, {}) for d in targets}
    rows += [{"scheme": n, "status": why} for n, why in left.items()]
    found = Sweep(
        {
            "schema_version": SCHEMA_VERSION,
            "parent": parent.digest,
            "devices": [str(d) for d in targets],
            "data": dataset.source if dataset else None,
            "target": goal.describe() or None,
            "rows": rows,
            "notes": _advice(rows, targets, goal),
            "benchmark": report.data,
        }
    )
    write_file(folder / REPORT, found.to_json().encode())
    return found


def _make(
    name: str,
    model: str | Path,
    folder: Path,
    given: Mapping[str, Any],
    made: dict[str, Path],
    left: dict[str, str],
) -> None:
    """Make one scheme's artifact, and note where it is, or why it could not be made.

    Raises:
        DataError: The data cannot be read, or do not fit: no scheme could do better.
        StorageError: Nothing can be written there.
    """
    scheme, place, told = SCHEMES[name], folder / name, given["progress"]
    if is_artifact(place):
        told.note(f"{name} is kept from the interrupted sweep")
        made[name] = Artifact.open(place).model_path
        return
    unused = {"dims"} if scheme.calibrated else set()
    options = {key: value for key, value in given.items() if key not in unused}
    try:
        with told.step(f"[{name}] {scheme.about}"):
            made[name] = scheme.verb(model, place, **options).model_path
    except (DataError, StorageError):
        raise
    except DeploykitError as exc:
        left[name] = str(exc)
        told.note(f"{name} is left out: {exc}")


def _stamp(data: str | Path | None) -> list[str]:
    """What tells one state of calibration data from another; of `file.py:function`, the file's."""
    if data is None:
        return []
    file, sep, _ = str(data).rpartition(":")
    return [str(data), *stamp_of(Path(file if sep else data))]


def _open_output(output: Path, record: Mapping[str, Any], *, resume: bool) -> Path:
    """Create the output, or go on in it.

    Raises:
        OutputExistsError: It is there, and is not what an interrupted sweep of the same model and data left.
    """
    file = output / _RECORD
    if resume and output.exists():
        try:
            same = json.loads(file.read_text(encoding="utf-8")) == record
        except (OSError, ValueError):
            same = False
        if not same:
            raise OutputExistsError(
                f"{output} was not left by a sweep of this model with these data and options", hint="choose another -o"
            )
        if (output / REPORT).exists():
            raise OutputExistsError(f"{output} holds a finished sweep", hint="choose another -o")
        return output
    try:
        check_free(output)
    except OutputExistsError as exc:
        hint = "add --resume to go on with it" if file.is_file() else exc.hint
        raise OutputExistsError(exc.what, hint=hint) from exc
    try:
        output.mkdir(parents=True)
        file.write_text(json.dumps(record), encoding="utf-8")
    except OSError as exc:
        raise storage_error(exc, output) or exc from exc
    return output


def _row(scheme: str, model: LoadedModel) -> dict[str, Any]:
    return {"scheme": scheme, "model": str(model.path), "size_bytes": model.size_bytes, "status": "ok"}


def _add_speed(rows: list[dict[str, Any]], report: Report) -> None:
    """Put each candidate's verdict against the parent on the first device into its row."""
    by_name = {str(row["scheme"]): row for row in rows}
    for number, entry in enumerate(report.candidates):
        row = by_name[str(entry["name"])]
        speed: dict[str, Any] = {"status": entry["status"]}
        if "median_ms" in entry:
            against = entry["against_reference"] if number else {"verdict": "reference", "ratio": 1.0}
            speed |= {"median_ms": entry["median_ms"], **against}
        row.setdefault("speed", {})[entry["device"]] = speed


def _add_quality(
    rows: list[dict[str, Any]], parent: LoadedModel, device: Device, data: Dataset, goal: Goal, told: Progress
) -> None:
    """Judge every model on one device against the parent there."""
    with tempfile.TemporaryDirectory(prefix="deploykit-sweep-") as name:
        limit = None if goal.asked else _ROWS
        try:
            judge = Judge(parent.path, parent.signature, device, data, goal, Path(name), limit=limit)
        except InferenceError as exc:
            told.note(f"nothing is judged in {device}, which cannot run the parent: {exc.what}")
            return
        for number, row in enumerate(rows[1:]):
            told.advance(number, len(rows) - 1, "models judged")
            if row["scheme"] == NATIVE and str(device) not in row.get("speed", {}):
                continue
            try:
                score = judge.judge(Path(row["model"]), precision="native" if row["scheme"] == NATIVE else "fp32")
            except DeploykitError as exc:
                row.setdefault("quality", {})[str(device)] = {"summary": f"failed: {exc.what}", "met": False}
                continue
            record = judge.record(score)
            kept = {k: v for k, v in record.items() if k in _KEPT}
            row.setdefault("quality", {})[str(device)] = {"summary": score.describe(goal), "met": score.met, **kept}


def _advice(rows: Sequence[Mapping[str, Any]], devices: Sequence[Device], goal: Goal) -> list[str]:
    """What the figures say: the fastest that keeps the target on each device, and where float is the answer."""
    said = []
    for device in map(str, devices):
        right = [r for r in rows if "ratio" in r.get("speed", {}).get(device, {}) and _is_right(r, device)]
        if not right:
            said.append(f"{device}: nothing ran that is right")
            continue
        best = max(right, key=lambda r: float(r["speed"][device]["ratio"]))
        others = [r for r in right if r is not best and _overlap(r["speed"][device], best["speed"][device])]
        kept = f", with {goal.describe()}" if goal.asked else ""
        tied = f" (not to be told from: {', '.join(str(r['scheme']) for r in others)})" if others else ""
        said.append(f"{device}: fastest{kept} is {best['scheme']}, {best['speed'][device]['ratio']:.2f}x{tied}")
        if best["scheme"] == PARENT or any(r["scheme"] == PARENT for r in others):
            said.append(f"{device}: nothing is clearly faster than the parent; quantize for its size only")
        if NATIVE in {best["scheme"], *(r["scheme"] for r in others)}:
            said.append(
                f"{device}: the parent in the CPU's own bfloat16 is as fast as anything here; "
                "nothing has to be quantized for speed (benchmark --precision native)"
            )
    return said


def _is_right(row: Mapping[str, Any], device: str) -> bool:
    return bool(row.get("quality", {}).get(device, {"met": True})["met"])


def _overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two intervals of a ratio have values in common."""
    low, high = (float(one.get(k, one["ratio"])) for k in ("low", "high"))
    return low <= float(other.get("high", other["ratio"])) and high >= float(other.get("low", other["ratio"]))


def table(sweep: Sweep) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table for a person."""
    devices = sweep.data["devices"]
    parts = [(d, kind) for d in devices for kind in ("quality", "speed", "int8")]
    body = []
    for row in sweep.rows:
        cells = [str(row["scheme"]), f"{row['size_bytes'] / 1e6:.2f}" if "size_bytes" in row else "-"]
        if row["status"] != "ok":
            body.append((*cells, row["status"], *["-"] * (len(parts) - 1)))
            continue
        cells += [_cell(row, device, kind) for device, kind in parts]
        body.append(tuple(cells))
    return ("scheme", "MB", *(f"{d} {kind}" for d, kind in parts)), body


def _cell(row: Mapping[str, Any], device: str, kind: str) -> str:
    found = row.get("placement" if kind == "int8" else kind, {}).get(device)
    if found is None:
        return "reference" if row["scheme"] == PARENT and kind == "quality" else "-"
    if kind == "speed":
        if "ratio" not in found:
            return str(found["status"])[:60]
        interval = f" [{found['low']:.2f}, {found['high']:.2f}]" if "low" in found else ""
        return f"{found['ratio']:.2f}x{interval}"
    if kind == "int8":
        layers = found["layers"]
        return "-" if not layers else " ".join(f"{n['int8']}/{n['total']} {op}" for op, n in layers.items())
    return str(found["summary"]) + ("" if found["met"] else " (missed)")
