"""Which Hugging Face architectures export by which path, and where the result gives the source's numbers.

    python benchmarks/suite/export_matrix.py                                 # print the matrix
    python benchmarks/suite/export_matrix.py --write docs/export-matrix.md   # and keep it
    python benchmarks/suite/export_matrix.py --model T5 --path torchscript   # one row, one path

Every model is small, built from a config, with random weights under which the outputs react to the inputs; every cell
is a whole `deploykit export` with its parity check at several shapes. tests/exporters/test_matrix.py repeats each cell
and compares it with the document.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hf_zoo

from deploykit import DeploykitError, export_parts
from deploykit.progress import Progress

PATHS = ("torch.export", "torchscript")
RUNTIMES = ("ort:cpu", "openvino:cpu")
_TOOLS = ("torch", "onnxscript", "onnx", "transformers", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Cell:
    """One graph by one path.

    Attributes:
        model: Name in `hf_zoo.ARCHITECTURES`.
        part: "encoder", "decoder", "text", "image", or "" where the model is one graph.
        path: The exporter.
        reasons: By runtime, why it is red; empty where it is green.
        how: What had to change for this path: "eager attention", "fixed shapes".
        why: The reason of that.
    """

    model: str
    part: str
    path: str
    reasons: tuple[str, str]
    how: str = ""
    why: str = ""

    @property
    def marks(self) -> tuple[str, str]:
        """One word a runtime, as in the document."""
        green = f"yes ({self.how})" if self.how else "yes"
        return tuple("no" if reason else green for reason in self.reasons)  # type: ignore[return-value]


def measure(model: str, path: str, folder: Path) -> list[Cell]:
    """Export one model by one path and compare it in both runtimes.

    Args:
        model: Name in `hf_zoo.ARCHITECTURES`.
        path: One of `PATHS`.
        folder: Receives the model, unless another path left it there, and the artifacts.
    """
    source = folder / "source"
    if not source.exists():
        hf_zoo.save(model, source)
    told = Progress()
    try:
        made = export_parts(source, folder / path, exporter=path, progress=told)
    except DeploykitError as exc:
        reason = _plain(exc.what)
        return [Cell(model, part, path, (reason, reason)) for part in hf_zoo.PARTS.get(model, ("",))]
    return [_cell(model, part, path, artifact) for part, artifact in made.items()]


def _cell(model: str, part: str, path: str, artifact: Any) -> Cell:
    step = artifact.manifest.lineage[0]
    how = re.sub(r"^(torch\.export|torchscript)( with )?", "", step.params["exporter"])
    why = next((note for note in step.notes if "was not used" in note), "") if how else ""
    records = {r["device"]: r for r in artifact.manifest.evidence.parity}
    reasons = tuple(
        "" if records[device]["verdict"] == "passed" else _plain(str(records[device].get("reason")))
        for device in RUNTIMES
    )
    return Cell(model, part, path, reasons, how, _plain(why))


def _plain(reason: str) -> str:
    """A reason without temporary paths and the numbers of symbols, which differ from run to run."""
    text = re.sub(r"/\S*/", "", reason)
    return re.sub(r"\bs\d+\b", "s", text)[:220]


def render(cells: Iterable[Cell]) -> str:
    """The document."""
    by_row: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        by_row.setdefault((cell.model, cell.part), {})[cell.path] = cell
    notes: list[str] = []
    lines = [
        "# Export matrix",
        "",
        "Written by `python benchmarks/suite/export_matrix.py --write docs/export-matrix.md`; every cell is repeated",
        "by `tests/exporters/test_matrix.py`. Small models from configs, random weights scaled so that outputs react",
        "to inputs: this shows that graphs are right, at several shapes, and says nothing of accuracy or speed.",
        "",
        f"Measured with {', '.join(f'{tool} {version(tool)}' for tool in _TOOLS)}.",
        "",
        "| model | class | graph | torch.export: ORT | OpenVINO | TorchScript: ORT | OpenVINO | notes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, part), paths in by_row.items():
        numbers = []
        for text in dict.fromkeys(t for cell in paths.values() for t in (*cell.reasons, cell.why) if t):
            if text not in notes:
                notes.append(text)
            numbers.append(f"[{notes.index(text) + 1}]")
        marks = [mark for path in PATHS for mark in (paths[path].marks if path in paths else ("", ""))]
        row = [model, type(hf_zoo.ARCHITECTURES[model]()).__name__, part or "whole", *marks, " ".join(numbers)]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", *(f"{number}. {text}" for number, text in enumerate(notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


def parse(document: str) -> dict[tuple[str, str, str], tuple[str, str]]:
    """The marks of a document, by model, graph and path."""
    found = {}
    for line in document.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(row) == 8 and row[0] in hf_zoo.ARCHITECTURES:
            part = "" if row[2] == "whole" else row[2]
            found[row[0], part, PATHS[0]] = (row[3], row[4])
            found[row[0], part, PATHS[1]] = (row[5], row[6])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the matrix."""
    parser = argparse.ArgumentParser(description="Export matrix: models by paths by runtimes.")
    parser.add_argument("--model", action="append", choices=list(hf_zoo.ARCHITECTURES))
    parser.add_argument("--path", action="append", choices=PATHS)
    parser.add_argument("--write", type=Path, help="also write the document here")
    asked = parser.parse_args(arguments)
    cells = []
    for model in asked.model or hf_zoo.ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            for path in asked.path or PATHS:
                cells += measure(model, path, Path(folder))
                print(f"{model} by {path}: {', '.join(cells[-1].marks)}", file=sys.stderr)
    document = render(cells)
    print(document, end="")
    if asked.write:
        asked.write.parent.mkdir(exist_ok=True)
        asked.write.write_text(document)
    red = sum(bool(reason) for cell in cells for reason in cell.reasons)
    print(f"{2 * len(cells) - red} of {2 * len(cells)} cells green", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
