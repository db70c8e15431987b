"""Models that are in this process already, in a training script: copied, so that nothing of theirs changes.

The copy is what is switched to evaluation mode, moved and unwrapped. Training flags, weights, gradients, devices, hooks
and the optimizer that holds the weights stay as they are, and so does torch's random state.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploykit.errors import SourceError, first_line
from deploykit.exporters.base import ExportOptions, Source
from deploykit.exporters.binding import parameters_of
from deploykit.exporters.factory import source_of
from deploykit.exporters.keras_model import is_keras_model
from deploykit.exporters.modules import bare
from deploykit.exporters.sklearn_source import is_estimator
from deploykit.extras import require


def is_model(value: Any) -> bool:
    """Whether it is a torch module, a Keras model or a scikit-learn estimator; nothing is imported for the answer."""
    return is_estimator(value) or is_keras_model(value) or _is_module(value)


def _is_module(value: Any) -> bool:
    """Whether it is a torch module, and no Keras model on torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module) and not is_keras_model(value)


def name_of(model: Any) -> str:
    """What a model is called in messages and in the lineage, like "module Net of train.py"."""
    inner = bare(model) if _is_module(model) else model
    kind = type(inner)
    home = kind.__module__
    if home == "__main__":
        file = getattr(sys.modules["__main__"], "__file__", None)
        home = Path(file).name if file else "this session"
    noun = "module" if _is_module(model) else "estimator" if is_estimator(model) else "model"
    return f"{noun} {kind.__qualname__} of {home}"


def open_model(model: Any, examples: Any, options: ExportOptions, label: str) -> Source:
    """A source for a model in this process.

    Args:
        model: A torch module, a Keras model or a fitted estimator.
        examples: As a factory gives them beside the model; None where the options describe the inputs, or where the
            model knows them itself.
        options: What the user asked for.
        label: For messages.

    Raises:
        SourceError: No model, or one that cannot be copied, or examples that do not fit it.
    """
    if not is_model(model):
        raise SourceError(
            f"a {type(model).__name__} cannot be exported",
            expected="a torch.nn.Module, a Keras model, a fitted scikit-learn estimator, or the path of a source",
            hint="call it, and export what it returns" if callable(model) else None,
        )
    if _is_module(model) and examples is None and not options.inputs:
        names = ", ".join(parameters_of(bare(model)).parameters) or "x"
        raise SourceError(
            f"{label} comes without example inputs (its forward takes: {names})",
            expected="example_inputs: a tensor, a tuple of arguments, or a dictionary of them",
            hint=f"or describe them: inputs=['{names.partition(',')[0]}=float32[batch,3,224,224]']",
        )
    return source_of(_copy(model, label), examples, None, options, label)


def _copy(model: Any, label: str) -> Any:
    if not _is_module(model):
        return _deep(model, {}, label)
    torch = require("torch", extra="torch")
    inner = bare(model)
    # What forward left behind (the old weight_norm, a kept activation) has a history, which deepcopy refuses.
    memo = {
        id(value): value.detach().clone()
        for part in inner.modules()
        for value in [*vars(part).values(), *part._buffers.values()]
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    }
    return _deep(inner, memo, label)


def _deep(model: Any, memo: dict[int, Any], label: str) -> Any:
    try:
        return copy.deepcopy(model, memo)
    except Exception as exc:
        raise SourceError(
            f"{label} cannot be copied ({first_line(exc)})",
            expected="a model without open files, locks, generators or a trainer among its attributes",
            hint="take that off, or export file.py:factory, a function that builds it and loads its weights",
        ) from exc


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Work as if nothing was around, and leave torch's random state as it was, so that a training goes on the same.

    A training loop may be inside of autocast or inference mode; what is exported is the model without them.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
