"""Calibration in parts: each part is a job, and what they saw adds up to the bits of one run over all data.

The parts are files of whole batches, because which values of an activation are counted hangs on the shape of a batch.
The bits are the same as long as all machines compute the same; processors with other instruction sets round otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.data import Dataset
from deploykit.errors import DataError, storage_error
from deploykit.modelfile import read_model, signature_of
from deploykit.optimizers import StaticConfig
from deploykit.optimizers.calibration import Calibration
from deploykit.optimizers.feeding import batch_of, batches_of
from deploykit.optimizers.quantize_static import observe
from deploykit.progress import Progress
from deploykit.quantizer import DeviceOpener
from deploykit.runtimes import parse_device
from deploykit.search.jobs import Job
from deploykit.specs import Array

STATE = "calibration.npz"


def cut(data: Dataset, model: Path, config: StaticConfig, folder: Path, shards: int) -> list[Path]:
    """Write calibration data in parts, each of the very batches that one run over all of them would have.

    Args:
        data: All of them; labels are left out.
        model: The ONNX file to be calibrated, which may have a batch of its own.
        config: `batch_size` and `max_samples` count.
        folder: Where the parts go.
        shards: How many there should be; fewer where there are not so many batches, more where a stream comes in pieces
            that are no whole batches.

    Returns:
        The files, in the order of the data.

    Raises:
        DataError: There are no data, or a part cannot be written.
    """
    signature = signature_of(read_model(model, weights=False))
    size, _ = batch_of(signature, config)
    if data.length is None:
        count = sum(1 for _ in batches_of(signature, data, config))
    else:
        count = -(-min(data.length, config.max_samples or data.length) // size)
    files = []
    for number, part in enumerate(_parts(batches_of(signature, data, config), size, count, shards)):
        path = folder / f"shard-{number:03}.npz"
        try:
            np.savez(path, **{name: np.concatenate([b[name] for b in part]) for name in part[0]})  # type: ignore[arg-type]
        except OSError as exc:
            raise storage_error(exc, path) or exc from exc
        except (KeyError, ValueError) as exc:
            raise DataError(
                f"{data.source}: batches do not fit together ({exc})",
                expected="the same names and, but for the first axis, the same shapes in every batch",
            ) from exc
        files.append(path)
    if not files:
        raise DataError(f"{data.source} holds no batch of {size} samples", expected="at least one")
    return files


def _parts(batches: Iterable[dict[str, Array]], size: int, count: int, shards: int) -> Iterator[list[dict[str, Array]]]:
    """Batches in groups of nearly equal numbers; a short one, which a stream may have in its middle, ends a group."""
    each, more = divmod(count, max(1, min(shards, count)))
    part: list[dict[str, Array]] = []
    made = 0
    for batch in batches:
        part.append(batch)
        if len(part) >= each + (made < more) or _rows(batch) < size:
            yield part
            part, made = [], made + 1
    if part:
        yield part


def _rows(batch: Mapping[str, Array]) -> int:
    return len(next(iter(batch.values())))


def shard_job(model: Path, shard: Path, config: StaticConfig, device: str, file: str = "model.onnx") -> Job:
    """The job that calibrates a part.

    Args:
        model: ONNX file without external data, or the directory with everything that belongs to it.
        shard: Written by `cut`.
        config: As for the quantization.
        device: Runs the model.
        file: Of a directory: the model's name.
    """
    told = asdict(replace(config, merge=(), merge_only=False, save_calibration=None, max_samples=None))
    params = {"config": told, "device": device, **({"file": file} if model.is_dir() else {})}
    return Job(
        "deploykit.search.shards:calibrate_shard", params, {"model": model, "data": shard}, f"calibrate {shard.stem}"
    )


def merge_job(states: Iterable[Path]) -> Job:
    """The job that adds up what parts saw; ``states`` in any order."""
    inputs = {f"state-{number:03}": path for number, path in enumerate(states)}
    return Job("deploykit.search.shards:merge_states", {}, inputs, "merge calibrations")


def calibrate_shard(
    params: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path, progress: Progress
) -> dict[str, Any]:
    """Deed of `shard_job`: writes what a part of the data shows to the file `STATE`.

    Raises:
        OptimizationError: The options or the model do not allow it.
        DataError: The data do not fit the model.
    """
    told = params["config"]
    config = StaticConfig(**{**told, "exclude": tuple(told["exclude"]), "merge": ()})
    model = inputs["model"] / params["file"] if "file" in params else inputs["model"]
    with progress.step("calibrate"):
        seen = observe(
            model, config, DeviceOpener(parse_device(params["device"])), Dataset.open(inputs["data"]), folder
        )
    seen.save(folder / STATE)
    return {"samples": seen.samples, "tensors": len(seen.tensors)}


def merge_states(
    params: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path, progress: Progress
) -> dict[str, Any]:
    """Deed of `merge_job`: writes the sum of all states to the file `STATE`.

    Raises:
        DataError: One cannot be read, or is of another model.
    """
    total: Calibration | None = None
    for path in inputs.values():
        found = Calibration.load(path)
        if total is None:
            total = found
        else:
            total.merge(found)
    if total is None:
        raise DataError("no calibration to merge", expected="at least one")
    total.save(folder / STATE)
    return {"samples": total.samples, "tensors": len(total.tensors)}
