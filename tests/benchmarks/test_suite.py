"""The commands behind the figures of the documentation; whole with `-m slow`, a part of each always."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SUITE = Path(__file__).parents[2] / "benchmarks" / "suite"


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SUITE / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("every", "least"), [(60, 20), pytest.param(1, 1600, marks=pytest.mark.slow)], ids=["part", "whole"]
)
def test_simplify_breaks_no_case_of_the_backend_suite(tmp_path: Path, every: int, least: int) -> None:
    done = run("backend_cases.py", "--every", every, "--json", tmp_path / "cases.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    found = records(tmp_path / "cases.jsonl")
    passed = [r["name"] for r in found if r["before"] == ""]
    assert len(passed) >= least
    assert [r["name"] for r in found if r.get("after") == ""] == passed
    assert sum(r["nodes_after"] < r["nodes_before"] for r in found if "nodes_after" in r) >= least // 10


def test_broken_case_is_reported(tmp_path: Path) -> None:
    """With an optimizer that changes what a model computes and a check that looks away, the command says so."""
    script = tmp_path / "planted.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(SUITE)!r})
import onnx
import backend_cases

def spoil(path, folder, sets):
    model = onnx.load(str(path))
    for node in model.graph.node:
        node.op_type = {{"Relu": "Neg"}}.get(node.op_type, node.op_type)
    onnx.save(model, str(folder / "spoilt.onnx"))
    count = {{"tool": "planted", "nodes_before": 1, "nodes_after": 1}}
    return folder / "spoilt.onnx", count, [], "made-up", []

backend_cases._simplify = spoil
sys.argv[1:] = ["--kind", "pytorch-converted", "--match", "ReLU", "--jobs", "1"]
sys.exit(backend_cases.main())
"""
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "broken by us        1  test_ReLU" in done.stdout


PART = ("--kind", "simple", "--kind", "pytorch-operator", "--every", 4)  # no node cases: to make them takes seconds


@pytest.mark.parametrize(
    ("chosen", "least"), [(PART, 8), pytest.param((), 1000, marks=pytest.mark.slow)], ids=["part", "whole"]
)
def test_onnx_files_are_exported_or_refused(tmp_path: Path, chosen: tuple[object, ...], least: int) -> None:
    done = run("onnx_sources.py", *chosen, "--json", tmp_path / "sources.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(r["verbs"].get("export") == "" for r in records(tmp_path / "sources.jsonl")) >= least


@pytest.mark.slow
def test_weights_over_two_gigabytes(tmp_path: Path) -> None:
    done = run("large_weights.py", "--dir", tmp_path, "--json", tmp_path / "table.json")
    assert done.returncode == 0, done.stdout + done.stderr
    for row in json.loads((tmp_path / "table.json").read_text()):
        # OpenVINO turns a dynamically quantized graph back into float32, in several copies.
        if row["step"] != "quantize dynamic":
            assert row["private"] < 1.5 * row["weights"], row


def test_a_broken_setup_is_named_with_its_cure(tmp_path: Path) -> None:
    done = run("broken_setups.py", "wrong provider", "--json", tmp_path / "broken.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong provider: named wrong-provider high" in done.stdout
    (found,) = json.loads((tmp_path / "broken.json").read_text())
    assert "--device ort:cpu" in found["cure"]
    assert run("broken_setups.py", "no such setup").returncode == 2
