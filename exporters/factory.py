"""`file.py:factory` and `package.module:factory`: code that builds the module; the user named it, so it is run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from deploykit.data import load_object, user_frame
from deploykit.errors import DeploykitError, SourceError, first_line
from deploykit.exporters.base import ExportOptions, Source
from deploykit.exporters.binding import bind_examples, made_up_examples
from deploykit.exporters.modules import unwrap
from deploykit.exporters.pytorch import TorchSource
from deploykit.extras import require

_EXPECTED = "a torch.nn.Module, (module, example_inputs), or (module, args, kwargs)"


def open_factory(text: str, options: ExportOptions) -> Source:
    """Call a factory without arguments; a module at that name is taken as it is.

    Raises:
        SourceError: Not found, it raised, or it returned something else.
    """
    torch = require("torch", extra="torch")
    found = load_object(text)
    made = found
    if not isinstance(found, torch.nn.Module):
        if not callable(found):
            raise SourceError(f"{text} is a {type(found).__name__}", expected=f"a function that returns {_EXPECTED}")
        made = _call(found, text)
    else:
        made = _copy(found, text)
    examples: Any = None
    keywords: Any = None
    if isinstance(made, tuple) and len(made) in (2, 3):
        made, examples, keywords = (*made, None)[:3]
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
