"""The verb `select_data`: a small part of a dataset that stands for all of it, for calibration."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifact import sha256_of
from deploykit.comparing import find_targets
from deploykit.data import LABELS, Dataset
from deploykit.errors import DataError, ModelError, OptimizationError, first_line
from deploykit.models import load_model
from deploykit.optimizers.coresets import METHODS, Spread, choose, spread
from deploykit.optimizers.features import Sketch, check_inputs, find_tensor, model_features, raw_features
from deploykit.packing import check_output, check_samples, scaling_notes, write_samples
from deploykit.progress import Progress
from deploykit.quantizer import DeviceOpener
from deploykit.runtimes import Device
from deploykit.specs import Array
from deploykit.weights import open_light
from deploykit.zarr_reader import METADATA, content_bytes
from deploykit.zarr_writer import check_alike

# More classes than samples over this are no classes.
_SAMPLES_IN_CLASS = 2
# Labels that are read at once.
_LABELS_READ = 4096
# Features of all samples in batches, with their labels.
_Extract = Callable[[Dataset], Iterator[tuple[Array, Array | None]]]


@dataclass(frozen=True, slots=True)
class Selection:
    """Samples that were chosen.

    Attributes:
        output: Where they are.
        source: Where they come from.
        samples: How many there were.
        indices: Their numbers in the source, ascending.
        order: The same, in the order in which they were chosen, class by class.
        method: "k-center", "herding" or "random".
        features: What they were chosen by: a tensor of a model, or "inputs".
        classes: How many strata there were; None where labels did not count.
        seed: Of what is random.
        sha256: Of the source: of its file or files, or of the values that a function gives.
        model: That the features are of; None for "inputs".
        model_sha256: Of its manifest, or of its file.
        spread: How well they stand for all, over all features.
        random: The same of as many samples chosen at random, in the same classes.
    """

    output: str
    source: str
    samples: int
    indices: tuple[int, ...]
    order: tuple[int, ...]
    method: str
    features: str
    classes: int | None
    seed: int
    sha256: str
    model: str | None
    model_sha256: str | None
    spread: Spread
    random: Spread

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def select_data(
    source: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    tensor: str | None = None,
    count: int | None = None,
    fraction: float | None = None,
    method: str = METHODS[0],
    stratify: bool = True,
    seed: int = 0,
    batch_size: int = 32,
    device: str | Device | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Choose a part of a dataset by features of its samples, and write it as a dataset.

    Features are what goes into the model's last product with weights, or what `tensor` names, averaged over space or
    sequence; without a model, the inputs themselves. They are kept in a temporary file, never all in memory.

    Args:
        source: Anything that `Dataset.open` reads; a function has to give the same samples twice.
        output: Ends in `.npz` or `.zarr`. What was chosen and how is noted in it: numbers of samples, method, seed, and
            the digests of source and model; `show_data` gives them.
        model: Artifact or `.onnx` file.
        tensor: Of the model, to choose by.
        count: How many samples.
        fraction: Which share of all instead, above 0, to 1.
        method: "k-center": no sample is far from a chosen one. "herding": the mean of the chosen ones is that of all.
            "random", to compare with.
        stratify: Give each class of `labels` its share, at least one sample, where there are any.
        seed: Of what is random: the first sample of k-center, the folding of wide features, "random".
        batch_size: Samples in one run of the model.
        device: Where the model runs; by default the CPU of the first installed runtime.
        progress: Told about steps and notes.

    Raises:
        DataError: The source cannot be read, does not fit the model, gives other samples the next time, or there are
            not that many samples, or more classes.
        ModelError: It is no ONNX file.
        OptimizationError: The features cannot be used, or there is no such tensor.
        OutputExistsError: Something is at the output.
    """
    told = progress or Progress()
    check_output(output, ".npz", ".zarr")
    if (count is None) == (fraction is None):
        raise DataError("how many samples?", expected="either a number or a share", hint="add -n 64 or --fraction 0.05")
    if count is not None and count < 1:
        raise DataError(f"{count} samples", expected="1 or more")
    if method not in METHODS:
        raise DataError(f"no method {method!r}", expected=", ".join(METHODS))
    if fraction is not None and not 0 < fraction <= 1:
        raise DataError(f"fraction {fraction:g}", expected="above 0, to 1")
    if tensor is not None and model is None:
        raise DataError(f"tensor {tensor!r} of which model?", hint="add -m MODEL")
    dataset = Dataset.open(source)
    with tempfile.TemporaryDirectory(prefix="deploykit-select-") as scratch:
        # All that can be refused is, before the model is run over the data.
        check_samples(dataset.head(1), output)
        name, digest, extract = _extractor(dataset, model, tensor, batch_size, device, Path(scratch))
        with told.step(f"look through {source}"):
            seen = _survey(dataset, source)
        number = count if count is not None else max(1, round(seen.samples * (fraction or 0)))
        if number > seen.samples:
            raise DataError(f"{source} holds {seen.samples} samples", expected=f"at least {number}")
        strata = _strata(seen.labels, number, told) if stratify else None
        features = _Features(Path(scratch) / "features.bin", seed)
        again = _Content()
        with told.step(f"features of {source}"):
            for values, _ in extract(dataset if dataset.names is not None else again.of(dataset)):
                features.add(values)
                told.advance(features.samples, seen.samples, "samples")
        if dataset.names is None and again.sha256 != seen.sha256:
            raise DataError(
                f"{source} gives other samples each time it is called", expected="the same samples in the same order",
                hint="seed what is random in it, or save them: numpy.savez",
            )  # fmt: skip
        rows = features.mapped()
        with told.step(f"choose {number} of {len(rows)} samples"):
            order = choose(
                rows, number, method=method, strata=strata, seed=seed,
                seen=lambda done: told.advance(done, number, "samples"),
            )  # fmt: skip
            found = spread(rows, order)
            by_chance = found
            if method != "random":
                by_chance = spread(rows, choose(rows, number, method="random", strata=strata, seed=seed))
    made = Selection(
        str(output), str(source), len(rows), tuple(sorted(order)), tuple(order), method, name,
        None if strata is None else len(np.unique(strata)), seed, seen.sha256,
        None if model is None else str(model), digest, found, by_chance,
    )  # fmt: skip
    record = {k: v for k, v in made.as_dict().items() if k != "output"}
    with told.step(f"write {output}"):
        write_samples(dataset, made.indices, output, json.loads(json.dumps(record)), scaling_notes(dataset))
    return made


def _extractor(
    dataset: Dataset, model: str | Path | None, tensor: str | None, batch_size: int, device: str | Device | None,
    scratch: Path,
) -> tuple[str, str | None, _Extract]:  # fmt: skip
    """What features are, in words, the model's digest, and what makes them; nothing is run yet.

    Raises:
        DataError: The samples do not fit the model.
        ModelError: It is no ONNX file.
        OptimizationError: It has no such tensor.
    """
    if model is None:
        return "inputs", None, lambda data: raw_features(data, batch_size)
    loaded = load_model(model)
    if loaded.path.suffix != ".onnx":
        raise ModelError(f"{loaded.path} is no ONNX file", expected="one whose inner tensors can be read")
    (first, *_), _ = find_targets([] if device is None else [device])
    light = open_light(loaded.path, scratch)
    found = find_tensor(light.proto, tensor)
    check_inputs(light, dataset, batch_size)

    def extract(data: Dataset) -> Iterator[tuple[Array, Array | None]]:
        return model_features(light, found, data, DeviceOpener(first), scratch, batch_size=batch_size)

    return f"{found.name} of {model}", loaded.digest, extract


class _Features:
    """Features in a file as they come."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._fold = path, Sketch(seed)
        self._stream = path.open("wb")
        self._width = 0
        self.samples = 0

    def add(self, values: Array) -> None:
        """Take those of the next samples.

        Raises:
            OptimizationError: They are not finite, so that no distance is.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            folded = np.ascontiguousarray(self._fold(values), np.float32)
        broken = np.flatnonzero(~np.isfinite(folded).all(axis=1))
        if len(broken):
            raise OptimizationError(
                f"the features of sample {self.samples + int(broken[0])} are not finite",
                expected="numbers without NaN and infinity",
                hint="mend the sample, or choose by another tensor (--tensor)",
            )
        self._stream.write(folded.data)
        self._width, self.samples = folded.shape[1], self.samples + len(folded)

    def mapped(self) -> Array:
        """`[samples, width]`, read where it is looked at."""
        self._stream.close()
        if not self.samples:
            raise DataError("the dataset holds no samples")
        return np.memmap(self._path, np.float32, mode="r", shape=(self.samples, self._width))


# --- what a source holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Survey:
    """What is known of a source before features are made.

    Attributes:
        samples: How many there are.
        labels: All of them; None where there are none.
        sha256: See `Selection`.
    """

    samples: int
    labels: Array | None
    sha256: str


class _Content:
    """Reads a dataset through, and hashes its values, whatever batches they come in."""

    def __init__(self) -> None:
        self._first: dict[str, Array] = {}
        self._hashes: dict[str, Any] = {}
        self.samples = 0

    def of(self, dataset: Dataset) -> Dataset:
        """The same dataset, hashed as it is read.

        Raises:
            DataError: While it is read: batches do not fit together.
        """

        def batches(size: int) -> Iterator[dict[str, Array]]:
            for batch in dataset.batches(size):
                self._add(batch, dataset.source)
                yield batch

        return Dataset(dataset.source, batches)

    def _add(self, batch: dict[str, Array], source: str) -> None:
        if not self._first:
            self._first = {name: array[:1].copy() for name, array in batch.items()}
            self._hashes = {name: hashlib.sha256(f"{a.dtype}{a.shape[1:]}".encode()) for name, a in batch.items()}
        if batch.keys() != self._first.keys():
            raise DataError(f"{source}: batches do not fit together", expected="the same names in every batch")
        for name, array in batch.items():
            first = self._first[name]
            check_alike(name, array, first.dtype, first.shape[1:])
            self._hashes[name].update(content_bytes(array.astype(first.dtype, copy=False)).data)
        self.samples += len(next(iter(batch.values())))

    @property
    def sha256(self) -> str:
        told = [(name, found.hexdigest()) for name, found in sorted(self._hashes.items())]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _survey(dataset: Dataset, source: str | Path) -> _Survey:
    """Count a source's samples, read its labels, and hash it.

    Raises:
        DataError: It cannot be read.
    """
    if dataset.names is not None and dataset.length is not None:
        labels = list(dataset.column(LABELS, _LABELS_READ)) if dataset.has_labels else []
        return _Survey(dataset.length, np.concatenate(labels) if labels else None, _hash_of(Path(source)))
    content = _Content()
    found = [batch.get(LABELS) for batch in content.of(dataset).batches(_LABELS_READ)]
    kept = [np.array(labels) for labels in found if labels is not None]
    return _Survey(content.samples, np.concatenate(kept) if kept else None, content.sha256)


def _strata(labels: Array | None, number: int, told: Progress) -> Array | None:
    """Labels, where they are classes.

    Raises:
        DataError: There are more classes than samples to choose.
    """
    if labels is None:
        return None
    if labels.ndim != 1 or labels.dtype.kind not in "iubUS":
        told.note(f"labels are {labels.dtype}{list(labels.shape)}, no classes: samples are chosen without them")
        return None
    kinds = len(np.unique(labels))
    if kinds * _SAMPLES_IN_CLASS > len(labels):
        told.note(f"labels have {kinds} values in {len(labels)} samples, no classes: samples are chosen without them")
        return None
    if number < kinds:
        raise DataError(
            f"{number} samples of {kinds} classes", expected=f"at least {kinds}, one of each",
            hint=f"take more (-n {kinds}), or choose without regard to classes: --no-stratify",
        )  # fmt: skip
    return labels


def _hash_of(path: Path) -> str:
    """What tells a source's state: of a file its hash, of a packed store the one that it gives of itself.

    Raises:
        DataError: It cannot be read.
    """
    try:
        if path.is_file():
            return sha256_of(path)
        if (digest := _own_digest(path)) is not None:
            return digest
        files = sorted(file for file in path.rglob("*") if file.is_file())
        told = [(file.relative_to(path).as_posix(), sha256_of(file)) for file in files]
    except OSError as exc:
        raise DataError(f"cannot read {path} ({first_line(exc)})") from exc
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _own_digest(store: Path) -> str | None:
    try:
        found = json.loads((store / METADATA).read_bytes())["attributes"]["deploykit"]["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(found)
