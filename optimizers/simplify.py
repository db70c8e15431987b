"""Graph simplification by onnxsim, by onnxslim as second opinion, in child processes that may crash or hang."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deploykit.errors import OptimizationError
from deploykit.extras import version_of
from deploykit.modelfile import copy_model, model_bytes, read_model
from deploykit.optimizers.base import Check, StepResult

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
    before = len(read_model(model, weights=False).graph.node)
    notes: list[str] = []
    for tool in _TOOLS:
        with tempfile.TemporaryDirectory(prefix="deploykit-simplify-") as folder:
            candidate = Path(folder) / "model.onnx"
            why = _run(tool, model, candidate, config.timeout_s) or check(candidate)
            if why:
                notes.append(f"{tool} was not used: {why}")
                continue
            copy_model(candidate, target)
        after = len(read_model(target, weights=False).graph.node)
        return StepResult(
            changed=target.read_bytes() != model.read_bytes(),
            notes=tuple(notes),
            params={"tool": tool, "nodes_before": before, "nodes_after": after, "bytes_after": model_bytes(target)},
            tools={tool: version_of(tool) or "unknown"},
        )
    copy_model(model, target)
    notes.append("no simplifier gave an acceptable result; the graph is left as it was")
    return StepResult(False, tuple(notes), {"tool": "none", "nodes_before": before, "nodes_after": before})


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
