"""Let onnxruntime's quantizers work on a graph whose large weights stay on disk.

They read a weight where they quantize it, through one function, and infer shapes by way of a second copy of the whole
model. Both are replaced while a quantizer runs, so that it holds one weight at a time instead of three times all.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from deploykit.optimizers.prepare import infer_shapes
from deploykit.weights import is_external

if TYPE_CHECKING:
    import onnx

    from deploykit.specs import Array

_QUANTIZERS = ("base_quantizer", "onnx_quantizer")
_RELOAD = "save_and_reload_model_with_shape_infer"


@contextmanager
def lazy_weights(folder: Path) -> Iterator[None]:
    """Resolve external weights of any graph below ``folder``, for this process, until the block ends.

    A future onnxruntime that reads weights in another way would fail to find them; it could not take wrong ones.
    """
    from onnx import numpy_helper

    original = numpy_helper.to_array

    def to_array(tensor: onnx.TensorProto, base_dir: str = "") -> Array:
        if not is_external(tensor):
            return np.asarray(original(tensor, base_dir))
        return read_weight(tensor, folder)

    def in_memory(model: Any) -> Any:
        return infer_shapes(getattr(model, "model", model))

    with ExitStack() as stack:
        stack.enter_context(patch.object(numpy_helper, "to_array", to_array))
        for name in _QUANTIZERS:
            module = importlib.import_module(f"onnxruntime.quantization.{name}")
            if hasattr(module, _RELOAD):
                stack.enter_context(patch.object(module, _RELOAD, in_memory))
        yield


def read_weight(tensor: onnx.TensorProto, folder: Path) -> Array:
    """An external weight, mapped and not read: pages come and go with use."""
    import onnx

    entries = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(
        folder / entries["location"],
        dtype,
        "r",
        offset=int(entries.get("offset") or 0),
        shape=tuple(tensor.dims),
    )
