"""The verb `select_data`: a small part of a dataset that stands for all of it, for calibration."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifact import sha256_of
from deploykit.comparing import find_targets
from deploykit.data import Dataset
from deploykit.errors import DataError, ModelError
from deploykit.models import load_model
from deploykit.optimizers.coresets import METHODS, Spread, choose, spread
from deploykit.optimizers.features import Sketch, find_tensor, model_features, raw_features
from deploykit.packing import check_suffix, scaling_notes, write_samples
from deploykit.progress import Progress
from deploykit.quantizer import DeviceOpener
from deploykit.runtimes import Device
from deploykit.specs import Array
from deploykit.staging import check_free
from deploykit.weights import open_light
from deploykit.zarr_reader import METADATA

# More classes than samples over this are no classes.
_SAMPLES_IN_CLASS = 2


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
        output: Ends in `.npz` or `.zarr`. The numbers of the samples are noted in it; `show_data` gives them.
        model: Artifact or `.onnx` file.
        tensor: Of the model, to choose by.
        count: How many samples.
        fraction: Which share of all instead, above 0, to 1.
        method: "k-center": no sample is far from a chosen one. "herding": the mean of the chosen ones is that of all.
            "random", to compare with.
        stratify: Give each class of `labels` its share, where there are any.
        seed: Of what is random: the first sample of k-center, the folding of wide features, "random".
        batch_size: Samples in one run of the model.
        device: Where the model runs; by default the CPU of the first installed runtime.
        progress: Told about steps and notes.

    Raises:
        DataError: The source cannot be read, does not fit the model, or there are not that many samples.
        ModelError: It is no ONNX file.
        OptimizationError: The features cannot be used.
        OutputExistsError: Something is at the output.
    """
    told = progress or Progress()
    check_suffix(output, ".npz", ".zarr")
    check_free(Path(output))
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
        features = _Features(Path(scratch) / "features.bin", seed)
        with told.step(f"features of {source}"):
            name, batches = _batches(dataset, model, tensor, batch_size, device, Path(scratch))
            for values, labels in batches:
                features.add(values, labels)
                told.advance(features.samples, dataset.length, "samples")
        rows = features.mapped()
        number = count if count is not None else max(1, round(len(rows) * (fraction or 0)))
        if number > len(rows):
            raise DataError(f"{source} holds {len(rows)} samples", expected=f"at least {number}")
        strata = _strata(features.labels, told) if stratify else None
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
        None if strata is None else len(np.unique(strata)), seed, found, by_chance,
    )  # fmt: skip
    record = {k: v for k, v in made.as_dict().items() if k != "output"} | {"sha256": _hash_of(source)}
    with told.step(f"write {output}"):
        write_samples(dataset, made.indices, output, json.loads(json.dumps(record)), scaling_notes(dataset))
    return made


def _batches(
    dataset: Dataset, model: str | Path | None, tensor: str | None, batch_size: int, device: str | Device | None,
    scratch: Path,
) -> tuple[str, Iterator[tuple[Array, Array | None]]]:  # fmt: skip
    """What features are, in words, and the features of all samples."""
    if model is None:
        return "inputs", raw_features(dataset, batch_size)
    loaded = load_model(model)
    if loaded.path.suffix != ".onnx":
        raise ModelError(f"{loaded.path} is no ONNX file", expected="one whose inner tensors can be read")
    (first, *_), _ = find_targets([] if device is None else [device])
    light = open_light(loaded.path, scratch)
    found = find_tensor(light.proto, tensor)
    batches = model_features(light, found, dataset, DeviceOpener(first), scratch, batch_size=batch_size)
    return f"{found.name} of {model}", batches


class _Features:
    """Features in a file as they come, and labels in memory."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._fold = path, Sketch(seed)
        self._stream = path.open("wb")
        self._labels: list[Array] | None = []
        self._width = 0
        self.samples = 0

    def add(self, values: Array, labels: Array | None) -> None:
        folded = np.ascontiguousarray(self._fold(values), np.float32)
        self._stream.write(folded.data)
        self._width, self.samples = folded.shape[1], self.samples + len(folded)
        if labels is None or self._labels is None:
            self._labels = None
        else:
            self._labels.append(np.array(labels))

    def mapped(self) -> Array:
        """`[samples, width]`, read where it is looked at."""
        self._stream.close()
        if not self.samples:
            raise DataError("the dataset holds no samples")
        return np.memmap(self._path, np.float32, mode="r", shape=(self.samples, self._width))

    @property
    def labels(self) -> Array | None:
        """All of them; None where there are none, or batches have others."""
        if not self._labels or len({(a.dtype.kind, a.shape[1:]) for a in self._labels}) != 1:
            return None
        return np.concatenate(self._labels)


def _strata(labels: Array | None, told: Progress) -> Array | None:
    """Labels, where they are classes."""
    if labels is None:
        return None
    if labels.ndim != 1 or labels.dtype.kind not in "iubUS":
        told.note(f"labels are {labels.dtype}{list(labels.shape)}, no classes: samples are chosen without them")
        return None
    kinds = len(np.unique(labels))
    if kinds * _SAMPLES_IN_CLASS > len(labels):
        told.note(f"labels have {kinds} values in {len(labels)} samples, no classes: samples are chosen without them")
        return None
    return labels


def _hash_of(source: str | Path) -> str | None:
    """What tells the source's state: of a file its hash, of a packed store the one that it gives of itself."""
    path = Path(source)
    if path.is_file():
        return sha256_of(path)
    try:
        digest = json.loads((path / METADATA).read_bytes())["attributes"]["deploykit"]["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(digest)
