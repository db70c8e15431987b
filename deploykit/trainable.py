"""Sources that can be trained, pruned and distilled, and how their results are measured and exported.

What these verbs share: a source of torch is opened as `export` opens it, its module is changed in place, and the source
is run anew for the reference outputs that the export is held to.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from deploykit.benchmarks.metrics import decide, find_metric, reduce_outputs
from deploykit.data import LABELS, Dataset
from deploykit.errors import DataError, OptionError, SourceError
from deploykit.exporters import ExportOptions, Source, open_source
from deploykit.exporters.live import name_of, open_model
from deploykit.exporters.pytorch import TorchSource
from deploykit.optimizers.training import Score
from deploykit.optimizers.training.folder import save_tensors, weights_of
from deploykit.optimizers.training.scoring import Pairs
from deploykit.progress import quiet
from deploykit.runtimes import Device, open_session
from deploykit.specs import Array, Feeds, Signature, TensorSpec, fit_feeds

_KINDS = "file.py:factory, package.module:factory or a Hugging Face model directory, of PyTorch"
_BATCH = 32


class Trainable:
    """A source whose module can be changed.

    Args:
        source: As `export` opens it.
    """

    def __init__(self, source: TorchSource) -> None:
        self._source = source
        self.label = source.label
        self.notes = source.notes
        # Samples stand along the first axis of a dataset, whether or not the export fixes its size.
        self._signature = Signature(
            tuple(TensorSpec(s.name, s.dtype, _any_number(s.shape)) for s in source.signature.inputs), ()
        )

    @property
    def source(self) -> TorchSource:
        """The source itself, with the reference outputs of the module as it was opened."""
        return self._source

    @property
    def module(self) -> Any:
        """The user's module, on the CPU; what happens to it happens to the source."""
        return self._source.module

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs, which are those of the arrays in a dataset."""
        return self._source.call.names

    def feed(self, module: Any, batch: Mapping[str, Any]) -> Any:
        """Run a module on tensors, `labels` among them, and give what it returns."""
        names = self._source.call.names
        args, kwargs = self._source.call.arguments(tuple(batch[name] for name in names))
        return module(*args, **kwargs)

    def fit(self, data: Dataset) -> Dataset:
        """A dataset whose arrays are checked against the inputs, and cast where no value changes.

        Raises:
            DataError: While it is read: a name is missing, or a shape or type does not fit.
        """

        def batches(size: int) -> Iterator[dict[str, Array]]:
            for batch in data.batches(size):
                labels = {LABELS: batch[LABELS]} if LABELS in batch else {}
                yield self.fit_batch(batch) | labels

        return Dataset(data.source, batches, length=data.length, names=data.names)

    def fit_batch(self, batch: Feeds) -> dict[str, Array]:
        """The inputs out of a batch, checked and cast.

        Raises:
            DataError: A name is missing, or a shape or type does not fit.
        """
        return fit_feeds(self._signature, {k: v for k, v in batch.items() if k != LABELS})

    def renewed(self, module: Any = None) -> Source:
        """The source with the weights that its module has now, or with another module of the same inputs."""
        return self._source.renewed(module)


def open_trainable(
    source: str | Path | Any, example_inputs: Any = None, options: ExportOptions | None = None
) -> Trainable:
    """Open a source of PyTorch; a module of this process is copied.

    Args:
        source: As for `export`.
        example_inputs: Beside a module of this process.
        options: As for `export`.

    Raises:
        SourceError: It is of another framework, or cannot be trained.
    """
    wanted = options or ExportOptions()
    if isinstance(source, str | Path) and example_inputs is not None:
        raise OptionError(f"example_inputs are given, and {source} has inputs of its own", hint="leave them out")
    # Loaders draw progress bars of their own.
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder, quiet(Path(folder) / "load.log"):
        if isinstance(source, str | Path):
            opened = open_source(str(source), wanted, _no_module)
        else:
            opened = open_model(source, example_inputs, wanted, name_of(source))
    if not isinstance(opened, TorchSource) or opened.kind not in ("pytorch", "huggingface"):
        _refuse(opened.label, f"it is of the kind {opened.kind}")
    if opened.scripted:
        _refuse(opened.label, "TorchScript is compiled for inference")
    if any(p.dtype.itemsize < 4 and p.is_floating_point() for p in opened.module.parameters()):
        raise SourceError(
            f"{opened.label} has weights in 16 bits, which are too coarse to be trained",
            expected="float32 weights", hint="call .float() in the factory; mixed precision is --precision",
        )  # fmt: skip
    return Trainable(opened)


def _no_module(path: Path) -> NoReturn:
    _refuse(str(path), "an ONNX file holds no torch module")


def _refuse(label: str, why: str) -> NoReturn:
    raise SourceError(f"{label} cannot be trained: {why}", expected=_KINDS)


def opened(data: str | Path | Dataset) -> Dataset:
    """A dataset, as it is or by where it stands."""
    return data if isinstance(data, Dataset) else Dataset.open(data)


def work_folder(output: Path) -> Path:
    """Where the training of an output stands."""
    return output.with_name(f"{output.name}.training")


def known_as(source: str | Path | Any, output: Path) -> str:
    """By what a training knows its source again: a path as seen from its output, so that both can be moved."""
    if not isinstance(source, str | Path):
        return name_of(source)
    whole = str(source)
    file, colon, factory = whole.rpartition(":")
    path, rest = (file, colon + factory) if colon and Path(file).is_file() else (whole, "")
    # Of two drives there is no way from one to the other; nor from a folder that is not there yet to anything else.
    return os.path.relpath(path, output.parent) + rest if Path(path).exists() else whole


def save_module(model: Trainable, folder: Path, log: Path) -> tuple[Path, ...]:
    """Write a module's weights; for a model of transformers the directory that it is loaded from.

    Args:
        model: What was trained.
        folder: Where; made where it is not there.
        log: Takes what frameworks print.

    Returns:
        The files that belong to the model.
    """
    module, assets = model.module, model.source.assets
    folder.mkdir(exist_ok=True)
    if not hasattr(module, "save_pretrained"):
        save_tensors(weights_of(module), folder / "weights.pt")
        return assets
    with quiet(log):
        module.save_pretrained(folder)
    for asset in assets:
        if not (folder / asset.name).exists():
            (folder / asset.name).write_bytes(asset.read_bytes())
    return tuple(folder / asset.name for asset in assets)


def find_score(metric: str) -> Score:
    """One of our metrics, or a plugin's, as a training takes it.

    Raises:
        DataError: There is none of this name.
    """
    scorer = find_metric(metric)

    def of(pairs: Pairs) -> float:
        labels: list[Array] = []
        found: list[Array] = []
        for output, truth in pairs:
            labels.append(truth)
            found.append(output if scorer.takes_outputs else reduce_outputs({"": output}))
        if not found:
            raise DataError("there are no samples to score")
        return scorer.score(np.concatenate(labels), np.concatenate(found) if scorer.takes_outputs else decide(found))

    return Score(metric, scorer.higher_is_better, of)


def measure_artifact(model: Path, device: str | Device, data: Dataset, score: Score) -> tuple[float, int]:
    """The metric of a model file, in a runtime.

    Args:
        model: The file.
        device: Where it runs.
        data: Inputs and `labels`.
        score: The metric.

    Returns:
        The metric, and how many rows it was measured on.

    Raises:
        DataError: There are no labels.
    """
    rows = 0
    with open_session(model, device) as session:
        signature = session.signature
        judged = next((s.name for s in signature.outputs if s.name == "logits"), signature.outputs[0].name)
        fixed = next((s.shape[0] for s in signature.inputs if s.shape and isinstance(s.shape[0], int)), None)

        def pairs() -> Iterator[tuple[Array, Array]]:
            nonlocal rows
            for batch in data.batches(fixed or _BATCH):
                count = len(next(iter(batch.values())))
                if LABELS not in batch:
                    raise DataError(f"{data.source} has no {LABELS!r}", hint="add them")
                feeds = {k: v for k, v in batch.items() if k != LABELS}
                if fixed and count < fixed:
                    feeds = {k: np.concatenate([v, np.repeat(v[-1:], fixed - count, 0)]) for k, v in feeds.items()}
                output = session.run(fit_feeds(signature, feeds))[judged]
                rows += count
                yield output[:count], batch[LABELS]

        return score.of(pairs()), rows


def _any_number(shape: tuple[int | str, ...] | None) -> tuple[int | str, ...] | None:
    return ("batch", *shape[1:]) if shape else shape
