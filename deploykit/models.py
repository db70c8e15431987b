"""A model as the verbs take it: an artifact, or a plain file, with what is known about its inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deploykit.artifact import Artifact, StepRecord, sha256_of
from deploykit.data import LABELS, Dataset, ValueRange, generate
from deploykit.errors import DataError, ModelError
from deploykit.exporters import ExportOptions
from deploykit.exporters.onnx_file import guess_sizes, vocabulary_ranges
from deploykit.exporters.pytorch import observed_range
from deploykit.exporters.torch_onnx import to_numpy
from deploykit.modelfile import check_model, model_bytes, read_model, signature_of
from deploykit.programs import load_program, read_inputs, read_outputs
from deploykit.specs import Array, Signature, fit_feeds, terms

# Distinct inputs that a benchmark rotates through.
_BENCHMARK_INPUTS = 32


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, verified where it is an artifact.

    Attributes:
        path: The model's file.
        signature: Inputs and outputs.
        ranges: Values that made-up inputs may take.
        artifact: The artifact it came from; None for a plain file.
        digest: sha256 of the manifest, or of the file.
        lineage: Steps so far.
        size_bytes: Model and weights.
        opset: Of the default domain; None for OpenVINO IR.
        sizes: Sizes of dynamic dimensions that the model is known to accept.
    """

    path: Path
    signature: Signature
    ranges: dict[str, ValueRange]
    artifact: Artifact | None
    digest: str
    lineage: list[StepRecord]
    size_bytes: int
    opset: int | None
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def unverifiable(self) -> bool:
        """Whether its evidence says that outputs do not react to inputs, which the user accepted."""
        parity = self.artifact.manifest.evidence.parity if self.artifact else []
        return any(record.get("verdict") == "unverifiable" for record in parity)

    @property
    def quantized(self) -> bool:
        """Whether a step of the lineage changed the numbers, or the source was quantized when it came."""
        return any(step.step.startswith("quantize") or step.params.get("quantized") for step in self.lineage)


def load_model(path: str | Path) -> LoadedModel:
    """Open an artifact, an `.onnx` or an `.xml` file.

    Raises:
        ModelError: Missing, corrupt or unsafe.
        ArtifactError: An artifact that was changed.
    """
    given = Path(path)
    artifact = Artifact.open(given) if given.is_dir() else None
    file = artifact.model_path if artifact else given
    if file.suffix == ".xml":
        return _load_ir(file, artifact)
    if not file.exists():
        raise ModelError(f"{file} does not exist", expected="an artifact directory, an .onnx or an .xml file")
    model = read_model(file, weights=False)
    check_model(model, file)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    if artifact:
        return LoadedModel(
            file, artifact.signature, artifact.ranges, artifact, artifact.digest, artifact.manifest.lineage,
            artifact.size_bytes, opset,
        )  # fmt: skip
    signature = signature_of(model)
    ranges = vocabulary_ranges(model, signature.inputs)
    return LoadedModel(file, signature, ranges, None, sha256_of(file), [], model_bytes(file), opset)


def _load_ir(file: Path, artifact: Artifact | None) -> LoadedModel:
    from deploykit.runtimes import open_session

    with open_session(file, "openvino:cpu") as session:
        signature = session.signature
    if artifact:
        return LoadedModel(
            file, artifact.signature, artifact.ranges, artifact, artifact.digest, artifact.manifest.lineage,
            artifact.size_bytes, None,
        )  # fmt: skip
    return LoadedModel(file, signature, {}, None, sha256_of(file), [], model_bytes(file), None)


def load_candidate(path: str | Path) -> LoadedModel:
    """Open what can be measured: as `load_model`, and programs of `torch.export.save` (`.pt2`) for PyTorch's devices.

    Raises:
        ModelError: Missing, corrupt or unsafe.
        ArtifactError: An artifact that was changed.
        MissingDependencyError: torch is not installed.
    """
    file = Path(path)
    return _load_program(file) if file.suffix == ".pt2" and not file.is_dir() else load_model(path)


def _load_program(file: Path) -> LoadedModel:
    from torch.utils import _pytree

    program = load_program(file)
    inputs = read_inputs(program)
    outputs, _ = read_outputs(program, inputs)
    tensors = [leaf for leaf in _pytree.tree_leaves(program.example_inputs or ()) if hasattr(leaf, "shape")]
    ranges: dict[str, ValueRange] = {}
    sizes: dict[str, int] = {}
    for spec, tensor in zip(inputs.specs, tensors if len(tensors) == len(inputs.specs) else (), strict=False):
        found = observed_range(to_numpy(tensor))
        if found is not None:
            ranges[spec.name] = found
        sizes |= {d: int(size) for d, size in zip(spec.shape or (), tensor.shape, strict=True) if isinstance(d, str)}
    signature = Signature(inputs.specs, outputs)
    return LoadedModel(file, signature, ranges, None, sha256_of(file), [], file.stat().st_size, None, sizes)


def probe_feeds(
    model: LoadedModel, data: Dataset | None, dims: Mapping[str, int]
) -> tuple[list[dict[str, Array]], str]:
    """Inputs to compare two models on: from data, else the golden inputs, else made up.

    Returns:
        At least one set of inputs, and where they come from.
    """
    _check_dims(model.signature, dims)
    if data is not None:
        return _from_data(model.signature, data, [1, 3, 8, 16]), data.source
    if model.artifact is not None and not dims:
        golden = [inputs for inputs, _ in model.artifact.golden()]
        if golden:
            kind = (
                model.artifact.manifest.evidence.parity[0].get("data")
                if model.artifact.manifest.evidence.parity
                else ""
            )
            return golden, "generated" if kind == "generated" else "golden"
    sizes = guess_sizes(model.signature.inputs, ExportOptions(dims=dims))
    batches = [{**sizes, **dict.fromkeys(_batch_symbols(model.signature), n), **dims} for n in (1, 2, 3)]
    cases = [generate(model.signature.inputs, s, ranges=model.ranges, seed=i) for i, s in enumerate(batches)]
    return cases, "generated"


def _check_dims(signature: Signature, dims: Mapping[str, int]) -> None:
    """Refuse sizes of dimensions that the model does not have.

    Raises:
        DataError: There is no such dimension.
    """
    unknown = next((name for name in dims if name not in signature.symbols), None)
    if unknown is not None:
        raise DataError(
            f"--dim names {unknown!r}, which is no dynamic dimension of the model",
            expected=f"one of {', '.join(signature.symbols) or 'none: all dimensions are fixed'}",
        )


def _batch_symbols(signature: Signature) -> list[str]:
    return [s.shape[0] for s in signature.inputs if s.shape and isinstance(s.shape[0], str)]


def _from_data(signature: Signature, data: Dataset, counts: Sequence[int]) -> list[dict[str, Array]]:
    fixed = [s.shape[0] for s in signature.inputs if s.shape and isinstance(s.shape[0], int)]
    wanted = [fixed[0]] * 3 if fixed else list(counts)
    rows = data.fitted(signature.inputs).head(sum(wanted))
    rows.pop(LABELS, None)
    have = len(next(iter(rows.values()))) if rows else 0
    cases: list[dict[str, Array]] = []
    start = 0
    for count in wanted:
        end = min(start + count, have)
        if end > start and (not fixed or end - start == count):
            cases.append(fit_feeds(signature, {k: v[start:end] for k, v in rows.items()}))
        start = end
    if not cases:
        raise DataError(f"{data.source} holds {have} samples", expected=f"at least {wanted[0]}")
    return cases


def benchmark_feeds(
    model: LoadedModel, data: Dataset | None, batch: int, dims: Mapping[str, int]
) -> tuple[list[dict[str, Array]], str, int]:
    """Distinct inputs of one batch size for a benchmark to rotate through.

    Returns:
        32 sets of inputs, where they come from, and their batch size: the model's own where that is fixed.

    Raises:
        DataError: The model's batch is fixed to another size, or the data do not fit.
    """
    inputs = model.signature.inputs
    fixed = [s.shape[0] for s in inputs if s.shape and isinstance(s.shape[0], int)]
    if fixed and batch != fixed[0] and batch != 1:
        raise DataError(f"batch {batch} for a model whose batch is fixed to {fixed[0]}", hint="leave --batch out")
    size = fixed[0] if fixed and isinstance(fixed[0], int) else batch
    _check_dims(model.signature, dims)
    clash = next((s for s in _batch_symbols(model.signature) if dims.get(s, size) != size), None)
    if clash is not None:
        raise DataError(f"--dim {clash}={dims[clash]} contradicts --batch {size}", hint=f"use --batch {dims[clash]}")
    if data is not None:
        rows = data.fitted(inputs).head(size * _BENCHMARK_INPUTS)
        rows.pop(LABELS, None)
        have = len(next(iter(rows.values()))) if rows else 0
        if have < size:
            raise DataError(f"{data.source} holds {have} samples", expected=f"at least one batch of {size}")
        picks = [(np.arange(size) + i * size) % have for i in range(max(1, min(_BENCHMARK_INPUTS, have)))]
        return [fit_feeds(model.signature, {k: v[p] for k, v in rows.items()}) for p in picks], data.source, size
    sizes = {**model.sizes, **_golden_sizes(model), **dims}
    full = guess_sizes(inputs, ExportOptions(dims=sizes)) | {s: size for s in _batch_symbols(model.signature)}
    return [generate(inputs, full, ranges=model.ranges, seed=i) for i in range(_BENCHMARK_INPUTS)], "generated", size


def _golden_sizes(model: LoadedModel) -> dict[str, int]:
    """Sizes that the source model was compared at: known to be accepted."""
    golden = model.artifact.golden() if model.artifact else []
    sizes: dict[str, int] = {}
    for feeds, _ in golden[-1:]:
        for spec in model.signature.inputs:
            for dim, size in zip(spec.shape or (), feeds[spec.name].shape, strict=False):
                if isinstance(dim, str) and len(terms(dim)) == 1:
                    sizes[dim] = size
    return sizes


def names_of(models: Sequence[str | Path]) -> list[str]:
    """Short distinct names: the last part of each path, more of it, or a number where that is not enough."""
    paths = [Path(m) for m in models]
    for parts in (1, 2, 3):
        names = ["/".join(p.parts[-parts:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(f"{name}#{seen[name]}" if seen[name] > 1 else name)
    return out
