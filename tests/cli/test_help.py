"""The command line starts light, and every error is one line with the right exit code."""

import re
import subprocess
import sys

import pytest

HEAVY = {"torch", "onnx", "onnxruntime", "openvino", "transformers", "numpy", "pydantic", "rich"}
COMMANDS = [
    [], ["doctor"], ["export"], ["simplify"], ["fuse"], ["preprocess"],
    ["preprocess", "image"], ["preprocess", "audio"], ["quantize"], ["quantize", "dynamic"], ["quantize", "static"],
    ["quantize", "repair"], ["quantize", "weights"], ["quantize", "half"], ["quantize", "sweep"], ["optimize"],
    ["apply"], ["verify"], ["sbom"], ["sign"], ["inspect"], ["benchmark"], ["report"], ["compare"], ["package"],
    ["smoke"], ["run"], ["serve"], ["data"], ["data", "pack"], ["data", "select"], ["data", "show"],
    ["finetune"], ["distill"], ["quantize", "qat"], ["prune"],
    ["cache"], ["cache", "list"], ["cache", "prune"], ["cache", "dir"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c) or "top")
def test_help_imports_nothing_heavy(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "deploykit", *command, "--help"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: deploykit")
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "click" in imported  # the list is being read
    assert not imported & HEAVY


def test_every_command_is_listed_with_its_help():
    from deploykit.cli import cli

    text = subprocess.run(
        [sys.executable, "-m", "deploykit", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for name in cli.list_commands(None):
        assert re.search(rf"^  {name} +\S", text, re.MULTILINE), name
        assert cli.get_command(None, name).help


def test_usage_errors_are_exit_code_2(run_cli):
    for args in ([], ["nosuch"], ["export"], ["export", "x.onnx"], ["quantize", "static", "-m", "x", "-o", "y"]):
        done = run_cli(*args)
        assert done.returncode == 2 or args == [], (args, done)
        assert "Traceback" not in done.stderr
