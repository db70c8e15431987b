"""`file.py:factory` and `package.module:factory`: code that builds the model; the user named it, so it is run."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

from deploykit.data import load_object, user_frame
from deploykit.errors import DeploykitError, SourceError, first_line
from deploykit.exporters.base import ExportOptions, Source
from deploykit.exporters.binding import bind_examples, made_up_examples
from deploykit.exporters.keras_model import is_keras_model, open_keras_model
from deploykit.exporters.modules import unwrap
from deploykit.exporters.pytorch import TorchSource
from deploykit.exporters.sklearn_source import SklearnSource, is_estimator
from deploykit.extras import require

_EXPECTED = (
    "a torch.nn.Module, a Keras model or a scikit-learn estimator, (model, example_inputs), or (module, args, kwargs)"
)


def open_factory(text: str, options: ExportOptions) -> Source:
    """Call a factory without arguments; a module at that name is taken as it is.

    Raises:
        SourceError: Not found, it raised, or it returned something else.
    """
    found = load_object(text)
    made = found
    if not _is_model(found):
        if not callable(found):
            raise SourceError(f"{text} is a {type(found).__name__}", expected=f"a function that returns {_EXPECTED}")
        made = _call(found, text)
    else:
        made = _copy(found, text)
    examples: Any = None
    keywords: Any = None
    if isinstance(made, tuple) and len(made) in (2, 3):
        made, examples, keywords = (*made, None)[:3]
    return source_of(made, examples, keywords, options, text)


def source_of(made: Any, examples: Any, keywords: Any, options: ExportOptions, text: str) -> Source:
    """A source for a model of any framework, which may be changed: it is a copy, or nobody else has it.

    Args:
        made: The model.
        examples: Its example inputs; None where there are none.
        keywords: Keyword arguments beside them, for a torch module.
        options: What the user asked for.
        text: What the user called it.

    Raises:
        SourceError: No model, or example inputs that do not fit it.
    """
    if is_estimator(made):
        return SklearnSource(made, options, text, examples)
    if is_keras_model(made):
        return open_keras_model(made, options, text, examples)
    torch = require("torch", extra="torch")
    if keywords is not None and not isinstance(keywords, Mapping):
        raise SourceError(
            f"{text} returned {type(keywords).__name__} as keyword arguments",
            expected="(module, args, kwargs) with a dictionary at the end",
            hint="mend the factory: several arguments are one tuple, (module, (x, y))",
        )
    if not isinstance(made, torch.nn.Module):
        raise SourceError(f"{text} returned {_describe(made)}", expected=_EXPECTED, hint="mend the factory")
    made = unwrap(made)
    if examples is None and not keywords:
        arrays, call, ranges = made_up_examples(made, options, text)
        return TorchSource(made, arrays, call, options, text, ranges=ranges or None, data="generated")
    arrays, call = bind_examples(made, () if examples is None else examples, text, keywords)
    return TorchSource(made, arrays, call, options, text)


def _is_model(value: Any) -> bool:
    """Whether it is a model already, and no function that makes one; nothing is imported for the answer."""
    torch = sys.modules.get("torch")
    return is_estimator(value) or is_keras_model(value) or (torch is not None and isinstance(value, torch.nn.Module))


def _copy(module: Any, text: str) -> Any:
    """A copy to move and to switch to evaluation mode; the module may be in use."""
    try:
        return copy.deepcopy(module)
    except Exception as exc:
        raise SourceError(
            f"module {text} cannot be copied ({first_line(exc)})",
            hint="name a function that builds it instead",
        ) from exc


def _call(factory: Any, text: str) -> Any:
    try:
        return factory()
    except DeploykitError:
        raise
    except Exception as exc:
        raise SourceError(
            f"factory {text} failed ({first_line(exc)}{user_frame(exc)})",
            expected=f"a function without arguments that returns {_EXPECTED}",
            hint="mend the factory",
        ) from exc


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(v).__name__ for v in value) or 'nothing'}"
    return f"{type(value).__name__} {value!r:.40}"
