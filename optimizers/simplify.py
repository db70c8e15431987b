"""Graph simplification by onnxsim, by onnxslim as second opinion, in child processes that may crash or hang."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.errors import ModelError, OptimizationError
from deploykit.extras import version_of
from deploykit.modelfile import copy_model, model_bytes, read_model
from deploykit.optimizers.base import Check, StepResult

if TYPE_CHECKING:
    import onnx

_WORKER = Path(__file__).with_name("simplify_worker.py")
_TOOLS = ("onnxsim", "onnxslim")


@dataclass(frozen=True, slots=True)
class SimplifyConfig:
    """How to simplify.

    Attributes:
        timeout_s: Seconds that one simplifier may take.
    """

    timeout_s: float = 300.0


def simplify(model: Path, config: SimplifyConfig, target: Path, check: Check) -> StepResult:
    """Simplify with the first tool whose result is acceptable; else the model stays as it is.

    Args:
        model: The ONNX file.
        config: Time limit.
        target: Where the result goes.
        check: Says why a candidate is not acceptable (does not load, or differs from ``model``).
    """
    if not (math.isfinite(config.timeout_s) and config.timeout_s > 0):
        raise OptimizationError(f"a time limit of {config.timeout_s} s", expected="a positive number")
    before = _count(model)
    notes: list[str] = []
    for tool in _TOOLS:
        with tempfile.TemporaryDirectory(prefix="deploykit-simplify-") as folder:
            candidate = Path(folder) / "model.onnx"
            why = _run(tool, model, candidate, config.timeout_s) or _grown(candidate, before) or check(candidate)
            if why:
                notes.append(f"{tool} was not used: {why}")
                continue
            copy_model(candidate, target)
        after = _count(target)
        return StepResult(
            changed=target.read_bytes() != model.read_bytes(),
            notes=tuple(notes),
            params={
                "tool": tool,
                "nodes_before": before,
                "nodes_after": after,
                "bytes_after": model_bytes(target),
            },
            tools={tool: version_of(tool) or "unknown"},
        )
    copy_model(model, target)
    notes.append("no simplifier gave an acceptable result; the graph is left as it was")
    return StepResult(False, tuple(notes), {"tool": "none", "nodes_before": before, "nodes_after": before})


def _grown(candidate: Path, before: int) -> str | None:
    """Why the candidate is no simplification: it is no model, or has more nodes than there were."""
    try:
        after = _count(candidate)
    except ModelError as exc:
        return f"it wrote no usable file ({exc})"
    return f"it made the graph larger: {after} nodes instead of {before}" if after > before else None


def _count(model: Path) -> int:
    """Nodes of a model. Those of subgraphs count: an If that is replaced by its branch makes the graph smaller."""
    proto = read_model(model, weights=False)
    return _count_nodes(proto.graph.node) + sum(_count_nodes(f.node) for f in proto.functions)


def _count_nodes(nodes: Iterable[onnx.NodeProto]) -> int:
    total = 0
    for node in nodes:
        total += 1
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                total += _count_nodes(graph.node)
    return total


def _run(tool: str, model: Path, candidate: Path, timeout_s: float) -> str | None:
    """Why the tool gave no file; None where it did."""
    # The worker's own folder is no place to import from: it holds a module for each of our steps.
    command = [sys.executable, "-P", str(_WORKER), tool, str(model), str(candidate)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, errors="replace")
    except subprocess.TimeoutExpired:
        return f"it took more than {timeout_s:.0f} s"
    except OSError as exc:
        raise OptimizationError(f"cannot start {sys.executable}: {exc}") from exc
    if done.returncode < 0:
        return f"it crashed with signal {-done.returncode}"
    if done.returncode != 0 or not candidate.is_file():
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return f"it failed ({lines[-1][:200] if lines else f'exit code {done.returncode}'})"
    return None
