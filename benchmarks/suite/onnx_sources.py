"""Is any ONNX file exported or refused, and nothing else? python benchmarks/suite/onnx_sources.py

Drives every model of the ONNX backend test suite, without its data, through inspect, export, verify, and both kinds of
quantization (calibrated on the golden inputs: that tests crashes, not accuracy). Each either succeeds or is refused in
one line. Exits with 1 where anything but DeployKit's own errors comes out, or an exported model gives other outputs
than the case expects where its source gave the right ones.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import numpy as np
import onnx
from onnx_cases import KINDS, Case, in_processes, load_cases, why_wrong

from deploykit.artifact import Artifact
from deploykit.errors import DeploykitError
from deploykit.exporting import export
from deploykit.inspecting import inspect_model
from deploykit.machine import allowed_cores
from deploykit.pipeline import quantize_dynamic, quantize_static, verify

VERBS = ("inspect", "export", "verify", "quantize dynamic", "quantize static")


def judge(case: Case) -> dict[str, Any]:
    """What each verb made of a model: "" for success, else the one line; a crash has its exception's name."""
    found: dict[str, Any] = {"name": case.name, "kind": case.kind, "verbs": {}, "crashes": {}}
    model, sets = case.read()

    def attempt(verb: str, call: Callable[[], Any]) -> Any:
        try:
            made = call()
        except DeploykitError as exc:
            text = str(exc)
            found["verbs"][verb] = f"{type(exc).__name__}: {text}"
            if not text or "\n" in text:
                found["crashes"][verb] = f"not one line: {text!r}"
        except Exception as exc:
            found["crashes"][verb] = f"{type(exc).__name__}: {exc}"[:300]
        else:
            found["verbs"][verb] = ""
            return made
        return None

    with tempfile.TemporaryDirectory(prefix="deploykit-sources-") as name:
        folder = Path(name)
        path = folder / "model.onnx"
        onnx.save(model, str(path))
        attempt("inspect", lambda: inspect_model(path, load=False))
        made = attempt("export", lambda: export(path, folder / "exported"))
        if made is None and found["verbs"].get("export", "").startswith("UnverifiableError"):
            made = attempt("export", lambda: export(path, folder / "accepted", allow_unverified=True))
            found["unverifiable"] = made is not None
        if made is not None:
            _judge_exported(case, path, made, sets, found, attempt)
    return found


def _judge_exported(
    case: Case, path: Path, made: Artifact, sets: Any, found: dict[str, Any], attempt: Callable[..., Any]
) -> None:
    folder = path.parent
    if not why_wrong(case, path, sets):
        found["wrong"] = why_wrong(case, made.model_path, sets)
    records = attempt("verify", lambda: verify(made.path)) or []
    if any(r["verdict"] == "failed" for r in records[:1]):
        found["wrong"] = f"verify: {records[0].get('reason')}"
    np.savez(folder / "data.npz", **_samples(made))  # type: ignore[arg-type]
    attempt("quantize dynamic", lambda: quantize_dynamic(made.path, folder / "dynamic", gate_seconds=0))
    attempt(
        "quantize static",
        lambda: quantize_static(made.path, folder / "static", data=folder / "data.npz", gate_seconds=0),
    )


def _samples(made: Artifact) -> dict[str, Any]:
    feeds = [inputs for inputs, _ in made.golden()]
    same = [f for f in feeds if all(f[n].shape[1:] == feeds[0][n].shape[1:] for n in f)]
    return {n: np.concatenate([f[n] for f in same]) if feeds[0][n].ndim else feeds[0][n] for n in feeds[0]}


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts."""
    verbs = {}
    for verb in VERBS:
        tried = [r["verbs"][verb] for r in records if verb in r.get("verbs", {})]
        verbs[verb] = {"done": tried.count(""), "refused": dict(Counter(map(_kind_of, filter(None, tried))))}
    return {
        "cases": len(records),
        "verbs": verbs,
        "wrong": [f"{r['name']}: {r['wrong']}" for r in records if r.get("wrong")],
        "crashes": [f"{r['name']}: {verb}: {text}" for r in records for verb, text in r.get("crashes", {}).items()]
        + [f"{r['name']}: the process ended with {r['died']}" for r in records if "died" in r],
    }


def _kind_of(text: str) -> str:
    """A reason without names and numbers, to count by."""
    short = re.sub(r"'[^']*'|/\S+|\[[^\]]*\]", "…", text.split("; ")[0])
    return re.sub(r"[-+]?\d[\d.e+-]*", "N", short)[:110]


def main() -> int:
    """Run the suite; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this kind of case")
    parser.add_argument("--every", type=int, default=1, help="only every n-th case")
    parser.add_argument("--match", default="", help="only cases with this regular expression in their name")
    parser.add_argument("--jobs", type=int, default=allowed_cores())
    parser.add_argument("--json", metavar="FILE", help="write one record a case")
    args = parser.parse_args()
    started = time.monotonic()
    cases = [c for c in load_cases(args.kind or KINDS) if re.search(args.match, c.name)][:: args.every]
    records = list(in_processes(cases, judge, contextlib.nullcontext, args.jobs))
    if args.json:
        Path(args.json).write_text("".join(json.dumps(r, default=str) + "\n" for r in records), encoding="utf-8")
    counts = summarize(records)
    print(f"cases {counts['cases']}, {time.monotonic() - started:.0f} s")
    for verb, found in counts["verbs"].items():
        print(f"{verb:17} done {found['done']}, refused in one line {sum(found['refused'].values())}")
        for reason, number in sorted(found["refused"].items(), key=lambda item: -item[1]):
            print(f"  {number:5} {reason}")
    for title in ("wrong", "crashes"):
        print(f"{title:17} {len(counts[title])}")
        for text in counts[title]:
            print(f"        {text}")
    return 1 if counts["wrong"] or counts["crashes"] else 0


if __name__ == "__main__":
    sys.exit(main())
