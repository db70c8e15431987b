"""A finding on disk: the node as a runnable model, its tensors, and how to replay it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.benchmarks.bisect_explain import Evidence
from deploykit.benchmarks.bisect_finding import Finding
from deploykit.errors import StorageError, storage_error
from deploykit.modelfile import write_model
from deploykit.specs import Array
from deploykit.staging import check_free

_REPLAY = '''"""Run the node alone, and compare what it gives with what both models had."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

here = Path(__file__).parent
names = json.loads((here / "tensors.json").read_text())


def load(file):
    found = {}
    with np.load(here / file) as arrays:
        for entry in names[file]:
            array = arrays[entry["key"]]
            if "stored_as" in entry:  # numpy has no such type
                import ml_dtypes

                array = array.view(np.dtype(getattr(ml_dtypes, entry["dtype"])))
            found[entry["name"]] = array
    return found


options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
session = ort.InferenceSession(str(here / "node.onnx"), options, providers=["CPUExecutionProvider"])
outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, load("inputs.npz"))))
for file in ("candidate.npz", "reference.npz"):
    for name, wanted in load(file).items():
        have = outputs[name]
        if have.shape != wanted.shape:
            print(f"{name}: shape {have.shape}, in {file} {wanted.shape}")
            continue
        far = np.abs(have.astype("float64") - wanted.astype("float64")).max(initial=0.0)
        print(f"{name}: max abs {far:.3g} from {file}")
'''


def save_finding(finding: Finding, output: Path, context: Mapping[str, Any]) -> Path:
    """Write a finding into a directory of its own, whole or not at all.

    Args:
        finding: With evidence, or only the report is written.
        output: The directory; nothing may be there.
        context: What was compared: models, devices, data.

    Returns:
        The directory.

    Raises:
        OutputExistsError: Something is there.
        StorageError: The place cannot be written.
    """
    check_free(output)
    staging: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.tmp-", dir=output.parent))
        report = {**context, **finding.as_dict()}
        (staging / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(_readme(finding, context), encoding="utf-8")
        if finding.evidence is not None:
            _save_evidence(finding.evidence, staging)
        staging.chmod(0o755)
        check_free(output)
        os.rename(staging, output)  # noqa: PTH104 - Path.rename may replace an empty directory as well
        staging = None
    except OSError as exc:
        raise storage_error(exc, output) or StorageError(f"cannot write {output}: {exc.strerror or exc}") from exc
    finally:
        if staging is not None:
            with contextlib.suppress(OSError):
                shutil.rmtree(staging)
    return output


def _save_evidence(evidence: Evidence, folder: Path) -> None:
    write_model(evidence.model, folder / "node.onnx")
    if evidence.reference_model is not None:
        write_model(evidence.reference_model, folder / "reference_node.onnx")
    names = {
        "inputs.npz": _save_arrays(evidence.inputs, folder / "inputs.npz"),
        "candidate.npz": _save_arrays(evidence.candidate, folder / "candidate.npz"),
        "reference.npz": _save_arrays(evidence.reference, folder / "reference.npz"),
    }
    (folder / "tensors.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    (folder / "replay.py").write_text(_REPLAY, encoding="utf-8")


def _save_arrays(arrays: Mapping[str, Array], path: Path) -> list[dict[str, str]]:
    """Write arrays under plain keys: tensor names hold slashes and colons. Returns which key is which tensor."""
    entries, stored = [], {}
    for number, (name, array) in enumerate(arrays.items()):
        key = f"t{number}"
        entry = {"key": key, "name": name, "dtype": array.dtype.name}
        if array.dtype.kind == "V" or array.dtype.isbuiltin != 1:  # bfloat16, float8: numpy saves no such types
            bits = np.dtype(f"u{array.dtype.itemsize}")
            entry["stored_as"] = bits.name
            array = np.ascontiguousarray(array).view(bits)
        stored[key] = array
        entries.append(entry)
    np.savez(path, **stored)  # type: ignore[arg-type]
    return entries


def _readme(finding: Finding, context: Mapping[str, Any]) -> str:
    lines = ["# Where two models part", "", finding.summary + ".", ""]
    lines += [f"- {key}: {value}" for key, value in context.items()]
    lines += [f"- {cause}" for cause in (*finding.causes, *finding.notes)]
    if finding.evidence is not None:
        lines += [
            "",
            "| file | holds |",
            "|---|---|",
            "| `node.onnx` | the node alone, as the candidate has it, with its weights |",
            "| `reference_node.onnx` | the reference's node for the same tensor, where there is one |",
            "| `inputs.npz` | what the node was given |",
            f"| `candidate.npz` | what it made of it, on {finding.evidence.device} |",
            "| `reference.npz` | what the reference has in its place |",
            "| `tensors.json` | which key of these files is which tensor |",
            "| `report.json` | everything that is known |",
            "",
            "Replay it with `python replay.py` (needs numpy and onnxruntime).",
        ]
    return "\n".join(lines) + "\n"
