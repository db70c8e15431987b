"""Static quantization by NNCF, Intel's quantizer: the second engine of `quantize static`.

NNCF is shown the graph as our own engine would quantize it: with named nodes, constants lifted and what exporters leave
idle taken away. What it makes (SmoothQuant for transformers, ranges, fast bias correction) goes through our repair, so
that activations are uint8 and the pairs stand where both runtimes fuse them; convolutions that it leaves without a
quantizer behind them get one, with ranges of our own calibration (`conv_outputs.py`).

NNCF changes no names of nodes or tensors. Therefore names to exclude are the same for both engines, and layers can be
ranked: its own file, before the repair folds factors into neighbours, is laid beside the float graph.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.data import Dataset
from deploykit.errors import DataError, DeploykitError, OptimizationError, first_line
from deploykit.extras import require, version_of
from deploykit.modelfile import INLINE_LIMIT_BYTES, model_bytes, read_model, signature_of
from deploykit.optimizers.base import Opener, StepResult
from deploykit.optimizers.calibration import calibrate
from deploykit.optimizers.conv_outputs import bare_outputs, quantize_outputs
from deploykit.optimizers.editor import GraphEditor
from deploykit.optimizers.escalation import model_kind
from deploykit.optimizers.feeding import Counter, feeds_of
from deploykit.optimizers.islands import shield_floats
from deploykit.optimizers.prepare import infer_shapes, prepare
from deploykit.optimizers.quantize_config import StaticConfig, check_engine, tools, weight_bits
from deploykit.optimizers.repair import RepairConfig, repair
from deploykit.optimizers.repair_pairs import PairEditor
from deploykit.optimizers.repair_types import drop_implied_clips
from deploykit.optimizers.rewrite import rewrite
from deploykit.optimizers.select_nodes import check_excluded, check_selected, kept_float, select_nodes
from deploykit.progress import Progress, quiet
from deploykit.specs import Feeds
from deploykit.weights import LightModel, open_light, write_copy, write_light

if TYPE_CHECKING:
    import onnx

_EXTRA = "nncf"
_CURE = "leave nodes out with --exclude, or take --engine deploykit"
_PAIR = ("QuantizeLinear", "DequantizeLinear")
# What the repair says about its own work is in the lineage; the rest concerns the user.
_ROUTINE = (
    "bit-exact: ",
    "within a step of the scale: ",
    "within rounding: ",
    "bits were not compared",
    "nothing needs",
)


def require_nncf() -> None:
    """Import NNCF.

    It sets the class of all loggers that are made after it, and logs to standard output.

    Raises:
        MissingDependencyError: It is not installed.
    """
    kind = logging.getLoggerClass()
    try:
        require("nncf", extra=_EXTRA)
        # Loaded here, because the imports of a quantization would run inside of `quiet`.
        require("nncf.onnx.quantization.quantize_model", extra=_EXTRA)
    finally:
        logging.setLoggerClass(kind)


def quantize_nncf(
    model: Path,
    config: StaticConfig,
    target: Path,
    open_model: Opener | None,
    data: Dataset | None,
    progress: Progress | None = None,
    keep_float: Path | None = None,
) -> StepResult:
    """Let NNCF insert Q/DQ pairs, and repair them.

    Args:
        model: Floating-point ONNX file.
        config: How; options that only our own engine knows have to be at their defaults.
        target: Where the result goes.
        open_model: Runs a model file, for ranges of outputs that NNCF gives none.
        data: Calibration data; labels are ignored.
        progress: Told how many batches were run.
        keep_float: Where the graph goes that NNCF is shown; NNCF's own file goes beside it.

    Raises:
        OptimizationError: Nothing to quantize, unusable options, or NNCF failed.
        MissingDependencyError: NNCF is not installed.
        DataError: The data do not fit the model.
    """
    if open_model is None or data is None:
        raise OptimizationError("static quantization needs calibration data", hint="add --data FILE")
    check_engine(config)
    if model_bytes(model) >= INLINE_LIMIT_BYTES:
        raise OptimizationError("NNCF is given models up to 2 GB only", hint="take --engine deploykit")
    require("onnxruntime", extra="ort")
    require_nncf()
    bits, why = weight_bits(config.weight_bits)
    told = progress or Progress()
    with tempfile.TemporaryDirectory(prefix=".nncf-", dir=target.parent) as name:
        scratch = Path(name)
        shown, notes = prepare(read_model(model))
        notes += rewrite(shown)
        shown = infer_shapes(shown)
        check_excluded(shown, config.exclude)
        # What pays, by the measure of our own engine.
        check_selected(select_nodes(shown, kept_float(shown, config.exclude)))
        if keep_float is not None:
            write_copy(LightModel(shown, scratch), keep_float)
        transformer = model_kind(shown).transformer
        batches, samples = _count(shown, data, config)
        with told.step("quantize with NNCF"):
            made = _run(shown, data, config, bits, transformer, batches, scratch, told)
        if not any(n.op_type == "DequantizeLinear" for n in made.graph.node):
            raise OptimizationError("nothing to quantize: NNCF put no Q/DQ pair into the graph", hint=_CURE)
        raw = scratch / "nncf.onnx" if keep_float is None else keep_float.with_name("nncf.onnx")
        write_light(LightModel(made, scratch), raw)
        repaired, light = _repaired(raw, scratch)
        closed = _close(light, shown, data, config, open_model, scratch, told)
        shielded = shield_floats(light.proto, frozenset())
        last = rewrite(light.proto, last=True)
        GraphEditor(light.proto).finish()
        quantized = _quantized_nodes(light.proto)
        write_light(light, target)
    if closed:
        notes.append(f"{closed} convolutions given a quantizer behind them, with ranges of our own calibration")
    notes += last + [note for note in repaired.notes if not note.startswith(_ROUTINE) and note not in notes]
    params: dict[str, Any] = {
        "engine": "nncf",
        "preset": "mixed",
        "model_type": "transformer" if transformer else None,
        "fast_bias_correction": True,
        "data": data.source,
        "samples": samples,
        "batches": batches,
        "per_channel": config.per_channel,
        "weight_bits": bits,
        "activations": "uint8 asymmetric",
        "weights": "int8 symmetric",
        "exclude": list(config.exclude),
        "repaired": {key: repaired.params[key] for key in ("bit_exact", "within_a_step", "rewritten")},
        "outputs_quantized": closed,
        "shielded_nodes": shielded,
        "quantized_nodes": quantized,
    }
    versions = tools() | {"nncf": version_of("nncf") or "unknown"}
    return StepResult(True, (*notes, *why), params, versions, raw if keep_float is not None else None)


def _count(shown: onnx.ModelProto, data: Dataset, config: StaticConfig) -> tuple[int, int]:
    """Batches and samples, from reading the data once; NNCF wants to know before it reads them.

    Raises:
        DataError: There is none, or they do not fit.
    """
    count = Counter()
    batches = sum(1 for _ in feeds_of(signature_of(shown), data, config, count))
    if not batches:
        raise DataError(f"{data.source} holds too few samples for one run of the model")
    return batches, count.samples


class _Batches:
    """The calibration data, from the beginning each time, as NNCF iterates over them."""

    def __init__(self, read: Callable[[], Iterator[Feeds]], length: int, told: Progress) -> None:
        self._read = read
        self._length = length
        self._told = told

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Feeds]:
        for number, feeds in enumerate(self._read(), start=1):
            self._told.advance(number, self._length, "batches")
            yield feeds


def _run(
    shown: onnx.ModelProto, data: Dataset, config: StaticConfig, bits: int, transformer: bool, batches: int,
    scratch: Path, told: Progress,
) -> onnx.ModelProto:  # fmt: skip
    """Call NNCF.

    Raises:
        OptimizationError: It failed, whatever it raised.
        DataError: The data failed while it read them.
    """
    import nncf
    import onnx
    from nncf.quantization import advanced_parameters as parameters

    given = onnx.ModelProto()
    given.CopyFrom(shown)
    names, floats = {node.name for node in given.graph.node}, sorted(kept_float(given, config.exclude))
    signature = signature_of(given)
    fix = nncf.OverflowFix.ENABLE if bits == 7 else nncf.OverflowFix.DISABLE
    weights = None if config.per_channel else parameters.QuantizationParameters(per_channel=False)
    source = _Batches(lambda: feeds_of(signature, data, config, Counter()), batches, told)
    try:
        with quiet(scratch / "nncf.log"), _mute():
            made: onnx.ModelProto = nncf.quantize(
                given,
                nncf.Dataset(source),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=batches,
                model_type=nncf.ModelType.TRANSFORMER if transformer else None,
                ignored_scope=nncf.IgnoredScope(
                    names=[n for n in floats if n in names],
                    types=[n for n in floats if n not in names],
                    validate=False,  # checked before; NNCF takes idle casts away itself
                ),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    overflow_fix=fix, weights_quantization_params=weights
                ),
            )
    except DeploykitError:
        raise
    except Exception as exc:
        raise OptimizationError(f"NNCF failed ({first_line(exc)})", hint=_CURE) from exc
    return made


@contextlib.contextmanager
def _mute() -> Iterator[None]:
    """No log lines, and no events to NNCF's maker, even where somebody else has imported it with its telemetry."""
    decorator: Any = require("nncf.telemetry.decorator", extra=_EXTRA)
    logger = logging.getLogger("nncf")
    before = decorator.telemetry, logger.level
    decorator.telemetry = _Silence()
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        decorator.telemetry = before[0]
        logger.setLevel(before[1])


class _Silence:
    """Stands where NNCF's telemetry stands."""

    def start_session(self, *args: object, **kwargs: object) -> None: ...

    def send_event(self, *args: object, **kwargs: object) -> None: ...

    def end_session(self, *args: object, **kwargs: object) -> None: ...


def _repaired(raw: Path, scratch: Path) -> tuple[StepResult, LightModel]:
    """The repair's account, and what it made."""
    folder = scratch / "repaired"
    folder.mkdir()
    done = repair(raw, RepairConfig(), folder / "model.onnx")
    return done, open_light(folder / "model.onnx", folder)


def _close(
    light: LightModel, shown: onnx.ModelProto, data: Dataset, config: StaticConfig, open_model: Opener, scratch: Path,
    told: Progress,
) -> int:  # fmt: skip
    """Quantize the outputs of convolutions that NNCF left in float, in place; how many."""
    known = {o for n in shown.graph.node for o in n.output}
    names = [name for name in bare_outputs(PairEditor(light.proto, light.folder)) if name in known]
    if not names:
        return 0
    inputs = signature_of(shown)
    with told.step("calibrate"), tempfile.TemporaryDirectory(prefix="ranges-", dir=scratch) as folder:
        seen = calibrate(
            LightModel(shown, scratch), names, feeds_of(inputs, data, config, Counter()), open_model, Path(folder),
            counted=False, divisible=all(s.shape and isinstance(s.shape[0], str) for s in inputs.inputs),
        )  # fmt: skip
    graph = PairEditor(light.proto, light.folder)
    count = quantize_outputs(graph, names, seen.ranges("minmax", config.percentile))
    graph.finish()
    graph = PairEditor(light.proto, light.folder)
    if drop_implied_clips(graph):
        graph.finish()
    return count


def _quantized_nodes(model: onnx.ModelProto) -> int:
    """Nodes that read an 8-bit copy."""
    copies = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    return sum(n.op_type not in _PAIR and not copies.isdisjoint(n.input) for n in model.graph.node)
