"""Activation ranges: one streaming pass over calibration data, memory independent of the number of samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.errors import OptimizationError
from deploykit.optimizers.base import Opener
from deploykit.specs import Array, Feeds
from deploykit.weights import LightModel, write_light

if TYPE_CHECKING:
    import onnx

# Beyond this a value is a mask constant (-3.4e38), not something that a scale of 255 steps could hold.
_MASK_MAGNITUDE = 1e30


class MinMax:
    """Smallest and largest finite value per tensor, mergeable in any order.

    Attributes:
        low: By tensor.
        high: By tensor.
        samples: Values seen, by tensor.
    """

    def __init__(self) -> None:
        self.low: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self.samples: dict[str, int] = {}

    def update(self, name: str, values: Array) -> None:
        """Take the values of one tensor into account; NaN, Inf and mask constants are left out."""
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high) and max(-low, high) < _MASK_MAGNITUDE):
            kept = values[np.isfinite(values) & (np.abs(values) < _MASK_MAGNITUDE)]
            if kept.size == 0:
                return
            low, high = float(kept.min()), float(kept.max())
        self.low[name] = min(low, self.low.get(name, low))
        self.high[name] = max(high, self.high.get(name, high))
        self.samples[name] = self.samples.get(name, 0) + int(values.size)


def collect_ranges(
    model: LightModel, tensors: Sequence[str], batches: Iterable[Feeds], open_model: Opener, folder: Path
) -> tuple[MinMax, int]:
    """Run the model over ``batches`` and watch ``tensors``.

    The tensors become outputs of a copy of the model; each batch is dropped as soon as it is seen.

    Args:
        model: Left as it is.
        tensors: Names of floating-point activations; graph inputs and outputs too.
        batches: Feeds.
        open_model: Opens a model file for inference.
        folder: For the copy of the model.

    Returns:
        The ranges and the number of batches.

    Raises:
        OptimizationError: There was no batch.
    """
    import onnx

    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    inputs = {v.name for v in proto.graph.input}
    watched = [t for t in tensors if t not in inputs]
    augmented = folder / "augmented.onnx"
    write_light(LightModel(_expose(proto, watched), model.folder), augmented)
    del proto
    run = open_model(augmented)
    ranges = MinMax()
    count = 0
    for feeds in batches:
        outputs = run(feeds)
        count += 1
        for name in tensors:
            values = outputs[name] if name in outputs else feeds[name]
            ranges.update(name, np.asarray(values))
    if count == 0:
        raise OptimizationError("the calibration data hold no batch", expected="at least one sample")
    return ranges, count


def _expose(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Add tensors to the outputs, in place."""
    import onnx

    present = {v.name for v in model.graph.output}
    known = {v.name: v for v in model.graph.value_info}
    for name in names:
        if name in present:
            continue
        elem_type = known[name].type.tensor_type.elem_type if name in known else onnx.TensorProto.FLOAT
        # Without a shape: a wrong one would be an error, a missing one is not.
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, elem_type, None))
    return model
