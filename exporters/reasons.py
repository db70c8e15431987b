"""Torch's long messages, cut down to the sentence that says why, with the line of the user's code."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deploykit.errors import first_line
from deploykit.exporters.tracing import raising_place

_NO_ONNX_FORM = (
    r"No ONNX function found for <OpOverload\(op='([^']+)'",
    r"No decompositions? registered for.*?'([\w:.]+)'",
    r"Exporting the operator '([^']+)'.*?not supported",
    r"Unsupported: ONNX export of operator ([\w:]+)",
    r"ONNX export failed.*?operator ([\w]+::\w+)",
    r"Tried to trace .*?but it is not part of the active trace.*?(__torch__[\w.]+)",
    r"Unknown builtin op: ([\w:]+)",
    r"'([\w.]+)' object has no attribute '(?:nms|roi_align|deform_conv2d)'",
)


def torch_reason(exc: BaseException, inputs: Sequence[str] = ()) -> str:
    """The sentence of torch's long messages that says why.

    Args:
        exc: What torch raised.
        inputs: Names for the inputs that torch counts.
    """
    chain = [exc]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    root = chain[-1]
    places = [place for item in reversed(chain) if (place := raising_place(item)) is not None]
    where = f" ({places[0]})" if places else ""
    text = str(root)
    for pattern in _NO_ONNX_FORM:
        match = re.search(pattern, text, re.DOTALL)
        if match:
            return f"the operator {match[1]} has no ONNX form"
    match = re.search(
        r"Could not (?:guard on|extract specialized integer from) data-dependent expression ([^\n(]+)", text
    )
    if match:
        return f"control flow depends on data{where or ': ' + match[1].strip()[:120]}"
    if "Data-dependent branching" in text or "Dynamic control flow is not supported" in text:
        return f"control flow depends on data{where}"
    match = re.search(r"inferred a static shape of (\d+) for dimension .*?\[(\d+)\]\.shape\[(\d+)\]", text)
    if match is None:
        match = _specialized(text)
    if match:
        number = int(match[2])
        name = repr(inputs[number]) if number < len(inputs) else f"input {number}"
        return f"the module fixes axis {match[3]} of {name} at {match[1]}"
    return f"{_plain(root)}{where}"


def _specialized(text: str) -> re.Match[str] | None:
    """`Dim.DYNAMIC`'s other wording of a dimension that the module fixes."""
    return re.search(
        r"specialized (?:it )?to be a constant \((\d+)\).*?\[(\d+)\](?:\.size\(\)|\.shape)?\[(\d+)\]", text, re.DOTALL
    )


def _plain(exc: BaseException) -> str:
    """The first line without terminal colours, advice to report a bug, and half a kilobyte of types."""
    line = re.sub(r"\x1b?\[\d+m", "", first_line(exc, 400))
    line = re.split(r" ?(?:Please |For more |To fix|This (?:may|might|is) |Caused by|\(original )", line)[0]
    return line if len(line) <= 240 else line[:237] + "..."
