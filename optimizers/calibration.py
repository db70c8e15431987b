"""Calibration: one streaming pass over data, in memory that does not grow with them, mergeable over shards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.archives import unsafe_archive
from deploykit.errors import DataError, OptimizationError, OutputExistsError, first_line
from deploykit.machine import allowed_cores
from deploykit.optimizers.base import Opener
from deploykit.optimizers.histogram import CODES, Histogram
from deploykit.optimizers.ranges import Ranges
from deploykit.optimizers.thresholds import choose_range
from deploykit.optimizers.watching import watch
from deploykit.specs import Array, Feeds
from deploykit.weights import LightModel, is_external, write_light

_SCHEMA = 1
_EXPECTED = "a file that --save-calibration wrote"


class Calibration:
    """What was seen of a model's activations.

    Args:
        model: Digest of the graph that the tensors belong to; see `digest_of`.
        tensors: By name.
        samples: Rows of calibration data, over all shards.
    """

    def __init__(self, model: str, tensors: Mapping[str, Histogram] | None = None, samples: int = 0) -> None:
        self.model = model
        self.tensors = dict(tensors or {})
        self.samples = samples

    def merge(self, other: Calibration) -> None:
        """Add what another run saw; in any order, and any grouping, the result is the same bit for bit.

        Raises:
            DataError: It belongs to another model.
        """
        if other.model != self.model:
            raise DataError(
                f"this calibration belongs to another graph ({other.model[:12]}, here {self.model[:12]})",
                expected="one of the same model, with the same options",
                hint="calibrate again: deploykit quantize static --data FILE --save-calibration FILE",
            )
        self.samples += other.samples
        for name, seen in other.tensors.items():
            self.tensors.setdefault(name, Histogram()).merge(seen)

    def ranges(self, method: str, percentile: float) -> Ranges:
        """Ranges of all tensors of which anything finite was seen; tensors share the cores."""
        seen = {n: t for n, t in self.tensors.items() if t.seen}
        with ThreadPoolExecutor(allowed_cores()) as pool:
            limits = pool.map(lambda tensor: choose_range(tensor, method, percentile), seen.values())
            found = dict(zip(seen, limits, strict=True))
        return Ranges({n: low for n, (low, _) in found.items()}, {n: high for n, (_, high) in found.items()})

    def save(self, path: Path) -> None:
        """Write a file, whole or not at all.

        Raises:
            OutputExistsError: Something is there.
            DataError: It cannot be written.
        """
        check_writable(path)
        names = sorted(self.tensors)
        kept = [self.tensors[n] for n in names]
        for tensor in kept:
            tensor.settle()
        about = {
            "schema": _SCHEMA, "model": self.model, "samples": self.samples, "tensors": names,
            "count": [t.count for t in kept], "nonfinite": [t.nonfinite for t in kept],
            "hidden": [t.hidden for t in kept],
        }  # fmt: skip
        made = io.BytesIO()
        np.savez_compressed(
            made,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            extremes=np.array([[t.low, t.high] for t in kept], np.float64).reshape(-1, 2),
            sizes=np.array([t.codes.size for t in kept], np.int64),
            codes=np.concatenate([t.codes for t in kept] or [np.zeros(0, np.int32)]),
            counts=np.concatenate([t.counts for t in kept] or [np.zeros(0, np.int64)]),
        )
        try:
            handle, temporary = tempfile.mkstemp(prefix=".calibration-", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(made.getvalue())
                Path(temporary).chmod(0o644)
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as exc:
            raise DataError(f"cannot write {path} ({first_line(exc)})", hint="choose another file") from exc

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            DataError: It is missing, damaged, or something else.
        """
        try:
            if why := unsafe_archive(path, unpacked=False):
                raise ValueError(f"it {why}")
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in ("about", "extremes", "sizes", "codes", "counts")}
            about = json.loads(arrays["about"].tobytes())
        except FileNotFoundError as exc:
            raise DataError(f"{path} does not exist", expected=_EXPECTED) from exc
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, RecursionError, MemoryError,
                zipfile.BadZipFile, zlib.error) as exc:  # fmt: skip
            raise DataError(f"cannot read {path} ({first_line(exc)})", expected=_EXPECTED) from exc
        if not isinstance(about, dict) or about.get("schema") != _SCHEMA:
            raise DataError(f"{path} is no calibration of this version", expected=_EXPECTED)
        try:
            return cls(str(about["model"]), _tensors(about, arrays), int(about["samples"]))
        except (KeyError, TypeError, ValueError, IndexError) as exc:
            raise DataError(f"{path} is damaged ({first_line(exc)})", expected=_EXPECTED) from exc


def _tensors(about: dict[str, Any], arrays: dict[str, Array]) -> dict[str, Histogram]:
    names, ends = about["tensors"], np.cumsum(arrays["sizes"])
    columns = [about["count"], about["nonfinite"], about["hidden"], arrays["extremes"], ends]
    if any(len(c) != len(names) for c in columns) or arrays["codes"].shape != arrays["counts"].shape:
        raise ValueError("its tables do not fit together")
    if names and ends[-1] != arrays["codes"].size:
        raise ValueError("its bins are not complete")
    found, start = {}, 0
    for name, count, nonfinite, hidden, (low, high), end in zip(names, *columns, strict=True):
        codes = arrays["codes"][start:end].astype(np.int32)
        counts = arrays["counts"][start:end].astype(np.int64)
        if codes.size and (codes.min() < 0 or codes.max() >= CODES or (np.diff(codes) <= 0).any() or counts.min() < 1):
            raise ValueError(f"its bins of {name!r} are no counts")
        found[str(name)] = Histogram(float(low), float(high), int(count), int(nonfinite), int(hidden), codes, counts)
        start = end
    return found


def check_writable(path: Path) -> None:
    """Refuse a place for a file before the work is done.

    Raises:
        OutputExistsError: Something is there.
        DataError: Its directory is missing.
    """
    if path.exists() or path.is_symlink():
        raise OutputExistsError(f"{path} exists already", hint="choose another file, or remove it")
    if not path.parent.is_dir():
        raise DataError(f"the directory {path.parent} does not exist", hint=f"run: mkdir -p {path.parent}")


def digest_of(model: LightModel) -> str:
    """sha256 of a graph with the weights that are in memory: what a calibration belongs to."""
    found = hashlib.sha256()
    for node in model.proto.graph.node:
        found.update(node.SerializeToString(deterministic=True))
    for weight in model.proto.graph.initializer:
        found.update(f"{weight.name} {weight.data_type} {list(weight.dims)}".encode())
        if not is_external(weight):
            found.update(weight.SerializeToString(deterministic=True))
    return found.hexdigest()


def calibrate(
    model: LightModel,
    tensors: Sequence[str],
    batches: Iterable[Feeds],
    open_model: Opener,
    folder: Path,
    *,
    counted: bool = True,
    divisible: bool = False,
) -> Calibration:
    """Run the model over ``batches`` and watch ``tensors``.

    The tensors become outputs of a copy of the model; each batch is dropped as soon as it is seen, and where it may be
    cut, it is, so that memory does not hang on its size.

    Args:
        model: Left as it is.
        tensors: Names of floating-point activations; graph inputs and outputs too.
        batches: Feeds.
        open_model: Opens a model file for inference.
        folder: For the copy of the model.
        counted: Whether values are counted, or only their extremes followed.
        divisible: Whether the model takes batches of any size, so that they may be cut.

    Raises:
        OptimizationError: There was no batch.
    """
    inputs = {v.name for v in model.proto.graph.input}
    augmented = folder / "augmented.onnx"
    _write_exposed(model, [t for t in tensors if t not in inputs], augmented)
    seen = Calibration(digest_of(model), {name: Histogram() for name in tensors})
    seen.samples = watch(open_model, augmented, seen.tensors, batches, counted=counted, divisible=divisible)
    for tensor in seen.tensors.values():
        tensor.settle()
    if not seen.samples:
        raise OptimizationError("the calibration data hold no batch", expected="at least one sample")
    return seen


def _write_exposed(model: LightModel, names: Sequence[str], path: Path) -> None:
    """Write a copy of the model with more outputs; large weights stay where they are."""
    import onnx

    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    present = {v.name for v in proto.graph.output}
    known = {v.name: v for v in proto.graph.value_info}
    for name in names:
        if name in present:
            continue
        elem_type = known[name].type.tensor_type.elem_type if name in known else onnx.TensorProto.FLOAT
        # Without a shape: a wrong one would be an error, a missing one is not.
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, elem_type, None))
    write_light(LightModel(proto, model.folder), path)
