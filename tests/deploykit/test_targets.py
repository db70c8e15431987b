"""What `--for` stands for: the table is sound, and what it does not hold is not guessed."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deploykit.errors import ContractError
from deploykit.targets import choose_opset, first_with, has_operator, known_targets, parse_target, parse_targets

ROOT = Path(__file__).parents[2]
TABLE = tomllib.loads((ROOT / "deploykit" / "targets.toml").read_text(encoding="utf-8"))


def key(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_every_row_has_its_sources() -> None:
    for kind in ("ort", "openvino", "triton"):
        assert len(TABLE[kind]) > 10
        for version, row in TABLE[kind].items():
            assert row["source"], (kind, version)
            assert set(row["source"]) <= set(TABLE["sources"]), (kind, version)
    assert all(url.startswith("https://") for url in TABLE["sources"].values())


def test_limits_only_grow() -> None:
    rows = [TABLE["ort"][v] for v in sorted(TABLE["ort"], key=key)]
    for before, after in itertools.pairwise(rows):
        assert all(before[k] <= after[k] for k in ("opset", "ml_opset", "ir"))


def test_limits_are_numbers_that_the_standard_has() -> None:
    import onnx

    releases = [(row[1], row[2]) for row in onnx.helper.VERSION_TABLE]
    for version, row in TABLE["ort"].items():
        assert row["opset"] in {opset for _, opset in releases}, version
        # A runtime that reads an opset reads the IR version that came with it.
        with_opset = min(ir for ir, opset in releases if opset == row["opset"])
        assert row["ir"] >= with_opset, version


def test_every_triton_row_leads_to_limits_or_says_why_not() -> None:
    for version, row in TABLE["triton"].items():
        if "ort" in row:
            target = parse_target(f"triton:{version}")
            assert target.runtime == "ort"
            assert target.opset == TABLE["ort"][".".join(row["ort"].split(".")[:2])]["opset"]
        else:
            with pytest.raises(ContractError, match="build between two releases"):
                parse_target(f"triton:{version}")


def test_every_known_target_can_be_parsed() -> None:
    names = known_targets()
    assert "triton:24.08" in names and "ort:1.18" in names and "openvino:2024.6" in names
    for name in names:
        if name != "triton:25.08":
            assert parse_target(name).sources


def test_published_facts() -> None:
    assert (parse_target("ort:1.18").opset, parse_target("ort:1.18").ir_version) == (21, 10)
    assert (parse_target("ort:1.16").opset, parse_target("ort:1.16").ir_version) == (19, 9)
    triton = parse_target("triton:24.08")
    assert (triton.version, triton.opset, triton.ir_version) == ("1.18.1", 21, 10)
    assert any("triton-inference-server" in s for s in triton.sources)
    assert "EPContext" not in parse_target("ort:1.16").contrib
    assert "EPContext" in parse_target("ort:1.17").contrib


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ort:1.13", ["ort:1.14"]),
        ("ort:9.9", ["ort:1.32"]),
        ("openvino:2022.1", ["openvino:2023.3"]),
        ("triton:24.13", ["triton:25.01"]),
        ("triton:23.08", ["triton:23.04"]),
        ("tensorrt:10", ["triton:YY.MM"]),
        ("ort", ["ort:VERSION"]),
        ("ort:", ["ort:1.18"]),
        ("ort:latest", ["ort:1.18"]),
    ],
)
def test_nothing_is_guessed(text: str, words: list[str]) -> None:
    with pytest.raises(ContractError) as caught:
        parse_target(text)
    for word in words:
        assert word in str(caught.value)


def test_spellings() -> None:
    assert parse_target("onnxruntime:1.18.1").opset == parse_target("ORT:1.18").opset
    assert parse_target("openvino:2024.6.0").missing == parse_target("ov:2024.6").missing
    assert len(parse_targets(["ort:1.18", "ort:1.18", "triton:24.08"])) == 2


def test_opset_is_the_lowest_limit_and_the_default() -> None:
    old, new = parse_targets(["ort:1.16", "ort:1.20"])
    assert choose_opset([new], None, 18) == 18
    assert choose_opset([old, new], None, 25) == 19
    assert choose_opset([old, new], 17, 18) == 17
    assert choose_opset([], 23, 18) == 23
    assert choose_opset(parse_targets(["openvino:2024.6"]), None, 18) is None
    with pytest.raises(ContractError, match=r"--opset 20 contradicts --for ort:1\.16.*19"):
        choose_opset([old, new], 20, 18)


def test_the_first_version_that_has_an_operator_is_found() -> None:
    assert first_with(parse_target("ort:1.15"), "MatMulNBits", "com.microsoft") == "ort:1.16"
    assert first_with(parse_target("ort:1.15"), "NoSuchOp", "com.microsoft") is None
    openvino = parse_target("openvino:2024.6")
    assert not has_operator(openvino, "Attention", "")
    found = first_with(openvino, "Attention", "")
    assert found is not None and re.fullmatch(r"openvino:202[56]\.\d", found)
    assert not has_operator(openvino, "SequenceAt", "")
    # No single node of it is read, and models with it are.
    newest = parse_target("openvino:2026.4")
    assert has_operator(newest, "SequenceConstruct", "") and any("patterns" in note for note in newest.notes)
    assert has_operator(openvino, "Conv", "") and not has_operator(openvino, "Scaler", "ai.onnx.ml")


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_the_installed_runtime_measures_as_its_row(runtime: str) -> None:
    """The script that made the table, run on what is installed here."""
    pytest.importorskip({"ort": "onnxruntime", "openvino": "openvino"}[runtime])
    script = ROOT / "benchmarks" / "suite" / "target_rows.py"
    done = subprocess.run([sys.executable, str(script), runtime], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)[runtime]
    minor = ".".join(row["version"].split(".")[:2])
    if minor not in TABLE[runtime]:
        pytest.fail(f"{runtime}:{minor} is not in the table; add what this says: {done.stdout}")
    known = TABLE[runtime][minor]
    if runtime == "ort":
        assert known["opset"] <= row["opset"]
        assert known["ml_opset"] <= row["ml_opset"]
        assert known["ir"] <= row["ir"]
        assert parse_target(f"ort:{minor}").contrib <= set(row["contrib"])
    else:
        assert row["opset"] is None and row["ir"] is None, "there is a limit now"
        assert (known["missing"], known["ml"], known["contrib"]) == (row["missing"], row["ml"], row["contrib"])
