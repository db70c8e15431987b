"""How a batch is given to a module, and which of its outputs is the one that counts."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from deploykit.data import LABELS
from deploykit.errors import DataError
from deploykit.extras import require

# Runs a module on named tensors, `labels` among them where there are any, and gives what it returns.
Feed = Callable[[Any, Mapping[str, Any]], Any]


def feed_by_name(module: Any, batch: Mapping[str, Any]) -> Any:
    """Run a module on a batch: by the names of `forward`'s parameters where all fit, in their order otherwise."""
    inputs = {name: tensor for name, tensor in batch.items() if name != LABELS}
    known = inspect.signature(module.forward).parameters
    if len(inputs) > 1 and all(name in known for name in inputs):
        return module(**inputs)
    return module(*inputs.values())


def first_output(result: Any) -> Any:
    """The tensor that is judged: `logits` where something is called that, else the first in what a module returned.

    Raises:
        DataError: There is no tensor in it.
    """
    torch = require("torch", extra="train")
    if isinstance(result, torch.Tensor):
        return result
    if isinstance(result, Mapping):
        return first_output(result["logits"] if "logits" in result else _first(result.values()))
    if dataclasses.is_dataclass(result):
        return first_output({f.name: getattr(result, f.name) for f in dataclasses.fields(result)})
    if isinstance(result, list | tuple):
        return first_output(_first(result))
    raise DataError(f"the module returned {type(result).__name__}", expected="a tensor, or a nest of tensors")


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def tensors_of(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """Arrays of a dataset as tensors on a device; integer labels as int64.

    Raises:
        DataError: Strings, or another type that torch does not have.
    """
    torch = require("torch", extra="train")
    made = {}
    for name, array in batch.items():
        if array.dtype.kind not in "iufb":
            raise DataError(f"{name!r} is {array.dtype}", expected="numbers", hint="tokenize texts before the training")
        own = array.astype(array.dtype.newbyteorder("="), copy=False)
        try:
            tensor = torch.from_numpy(own.copy() if not own.flags.writeable or not own.flags.c_contiguous else own)
        except TypeError as exc:
            raise DataError(f"{name!r} is {own.dtype}, which torch lacks", expected="float64 or smaller") from exc
        if name == LABELS and array.dtype.kind in "iub":
            tensor = tensor.to(torch.int64)
        made[name] = tensor.to(device)
    return made
