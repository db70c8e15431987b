"""Is `simplify` safe? Runs it over the ONNX backend test suite: python benchmarks/suite/backend_cases.py

Every case that ONNX Runtime passes, with the case's own data and tolerances, has to pass after `deploykit.simplify`.
The verb is given the bare model, so that its own checks work on inputs that it makes up and never see the data that
decide here. Where it refuses that (no inputs can be made up, or outputs do not react to them), it is given the case's
inputs as golden ones; where a model has sequences as inputs or outputs, which artifacts cannot hold, the optimizer's
step alone is run with the case's inputs as its check.

Exits with 1 where a case is broken, or the tool raises anything but its own errors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import onnx
from onnx_cases import KINDS, Case, in_processes, load_cases, run_case, why_wrong

from deploykit.artifact import GOLDEN, Artifact, Evidence, StepRecord, write_golden
from deploykit.deriving import simplify
from deploykit.errors import DeploykitError, ParityError, first_line
from deploykit.machine import allowed_cores
from deploykit.modelfile import signature_of
from deploykit.optimizers import SimplifierProcess, SimplifyConfig, optimize
from deploykit.staging import ArtifactWriter

_TIMEOUT_S = 60.0
_process: SimplifierProcess | None = None


@contextlib.contextmanager
def _simplifier() -> Iterator[None]:
    global _process
    with SimplifierProcess() as _process:
        yield


def judge(case: Case) -> dict[str, Any]:
    """Run one case before and after; a JSON-ready record."""
    started = time.monotonic()
    found: dict[str, Any] = {"name": case.name, "kind": case.kind}
    model, sets = case.read()
    with tempfile.TemporaryDirectory(prefix="deploykit-cases-") as name:
        folder = Path(name)
        path = folder / "model.onnx"
        onnx.save(model, str(path))
        found["before"] = why_wrong(case, path, sets)
        if not found["before"]:
            try:
                made, params, notes, way, refused = _simplify(path, folder, sets)
                found |= {"way": way, "notes": notes, "refused": refused, **params}
                found["after"] = why_wrong(case, made, sets)
            except Exception as exc:
                if isinstance(exc, DeploykitError) and not isinstance(exc, ParityError):
                    found["refused"] = [*found.get("refused", []), str(exc)]
                else:
                    found["crash"] = f"{type(exc).__name__}: {exc}"[:500]
    return found | {"seconds": round(time.monotonic() - started, 3)}


def _simplify(path: Path, folder: Path, sets: Any) -> tuple[Path, dict[str, Any], list[str], str, list[str]]:
    """The simplified file, the step's parameters and notes, how it was made, and what refused to make it."""
    refused = []
    try:
        made = simplify(path, folder / "simplified", timeout_s=_TIMEOUT_S, process=_process)
        return made.model_path, *_step(made), "made-up", refused
    except DeploykitError as exc:
        refused.append(str(exc))
    try:
        made = simplify(
            _golden(path, folder / "golden", sets), folder / "again", timeout_s=_TIMEOUT_S, process=_process
        )
        return made.model_path, *_step(made), "golden", refused
    except DeploykitError as exc:
        refused.append(str(exc))
    wanted = [run_case(path, inputs) for inputs, _ in sets]

    def check(candidate: Path) -> str | None:
        try:
            for (inputs, _), want in zip(sets, wanted, strict=True):
                onnx.backend.test.runner.Runner.assert_similar_outputs(want, run_case(candidate, inputs), 1e-3, 1e-5)
        except Exception as exc:
            return f"its outputs differ: {first_line(exc)}"
        return None

    target = folder / "step.onnx"
    done = optimize(path, SimplifyConfig(_TIMEOUT_S), target, check=check, process=_process)
    return target, done.params, list(done.notes), "step", refused


def _step(made: Artifact) -> tuple[dict[str, Any], list[str]]:
    step = made.manifest.lineage[-1]
    return dict(step.params), step.notes


def _golden(path: Path, output: Path, sets: Any) -> Path:
    """An artifact as `export --allow-unverified` leaves it, with the case's inputs as golden ones."""
    model = onnx.load(str(path))
    signature = signature_of(model)
    names = [[s.name for s in side] for side in (signature.inputs, signature.outputs)]
    with ArtifactWriter(output) as writer:
        (writer.dir / "model.onnx").write_bytes(path.read_bytes())
        cases = [[dict(zip(n, values, strict=True)) for n, values in zip(names, s, strict=True)] for s in sets]
        write_golden(writer.dir / GOLDEN, [(inputs, outputs) for inputs, outputs in cases])
        writer.commit(
            model="model.onnx",
            signature=signature,
            lineage=[StepRecord(step="export", params={}, tools={}, parent=None, seconds=0.0)],
            evidence=Evidence(parity=[{"verdict": "unverifiable", "data": "example"}]),
        )
    return output


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts."""
    passed = [r for r in records if r.get("before") == ""]
    after = [r for r in passed if r.get("after") == ""]
    smaller = [r for r in after if r["nodes_after"] < r["nodes_before"]]
    return {
        "cases": len(records),
        "by_kind": dict(Counter(r["kind"] for r in records)),
        "passed_before": len(passed),
        "passed_after": len(after),
        "broken": [r["name"] for r in passed if r.get("after")],
        "crashes": [r["name"] for r in records if "crash" in r or "died" in r],
        "refused": [r["name"] for r in passed if "after" not in r and "crash" not in r],
        "fewer_nodes": len(smaller),
        "nodes": [sum(r["nodes_before"] for r in after), sum(r["nodes_after"] for r in after)],
        "by_tool": dict(Counter(r["tool"] for r in after)),
        "checked_on": dict(Counter(r["way"] for r in after)),
        "rejected": dict(Counter(_kind_of(n) for r in after for n in r["notes"] if "was not used" in n)),
        "verb_refused": dict(Counter(_kind_of(text) for r in passed for text in r.get("refused", [])).most_common()),
    }


def _kind_of(text: str) -> str:
    """A reason without names and numbers, to count by."""
    short = re.sub(r"'[^']*'|/\S+|\[[^\]]*\]", "…", text.split("; ")[0])
    return re.sub(r"[-+]?\d[\d.e+-]*", "N", short)[:90]


def show(counts: dict[str, Any], seconds: float) -> None:
    """Print the table."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in counts["by_kind"].items())
    print(f"cases               {counts['cases']}  ({kinds})")
    print(f"passed before       {counts['passed_before']}")
    print(f"passed after        {counts['passed_after']}")
    print(f"broken by us        {len(counts['broken'])}  {' '.join(counts['broken'])}")
    print(f"crashes of the tool {len(counts['crashes'])}  {' '.join(counts['crashes'])}")
    print(f"refused             {len(counts['refused'])}  {' '.join(counts['refused'])}")
    print(f"really smaller      {counts['fewer_nodes']}  ({counts['nodes'][0]} nodes -> {counts['nodes'][1]})")
    print(f"by tool             {counts['by_tool']}")
    print(f"checked on          {counts['checked_on']}")
    for title, kind in (("results of a simplifier rejected", "rejected"), ("refused by the verb", "verb_refused")):
        print(f"{title}:")
        for reason, number in sorted(counts[kind].items(), key=lambda item: -item[1]):
            print(f"  {number:5} {reason}")
    print(f"seconds             {seconds:.0f}")


def main() -> int:
    """Run the suite; 1 where something is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this kind of case")
    parser.add_argument("--every", type=int, default=1, help="only every n-th case")
    parser.add_argument("--match", default="", help="only cases with this regular expression in their name")
    parser.add_argument("--jobs", type=int, default=allowed_cores())
    parser.add_argument("--json", metavar="FILE", help="write one record a case")
    args = parser.parse_args()
    started = time.monotonic()
    cases = [c for c in load_cases(args.kind or KINDS) if re.search(args.match, c.name)][:: args.every]
    records = []
    for record in in_processes(cases, judge, _simplifier, args.jobs):
        records.append(record)
        if sys.stderr.isatty():
            print(f"\r{len(records)}/{len(cases)}", end="", file=sys.stderr)
    if args.json:
        Path(args.json).write_text("".join(json.dumps(r, default=str) + "\n" for r in records), encoding="utf-8")
    counts = summarize(records)
    show(counts, time.monotonic() - started)
    return 1 if counts["broken"] or counts["crashes"] else 0


if __name__ == "__main__":
    sys.exit(main())
