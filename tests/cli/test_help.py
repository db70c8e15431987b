"""The command line starts light, and every error is one line with the right exit code."""

import json
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


# Each command in a fork of a process that has loaded no command: what they import, none finds there already.
FORKS = """
import contextlib, io, json, os, sys
from deploykit.cli import main

for command in json.loads(sys.argv[1]):
    if os.fork() == 0:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                main([*command, "--help"])
            except SystemExit as exc:
                code = exc.code
        print(json.dumps([code, said.getvalue(), sorted(sys.modules)]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def helped(tmp_path_factory):
    """Of every command with --help: exit code, what it printed, and the modules that were loaded."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps(COMMANDS)], capture_output=True, text=True, check=True,
        cwd=tmp_path_factory.mktemp("help"),
    )  # fmt: skip
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=[" ".join(c) or "top" for c in COMMANDS])
def test_help_imports_nothing_heavy(helped, number):
    assert len(helped) == len(COMMANDS)
    code, said, modules = helped[number]
    assert code == 0
    assert said.startswith(f"Usage: {' '.join(['deploykit', *COMMANDS[number]])} ")
    assert "click" in modules  # the list is being read
    assert not HEAVY & set(modules)


@pytest.mark.parametrize("command", [[], ["quantize", "static"]], ids=lambda c: " ".join(c) or "top")
def test_help_of_a_fresh_process_imports_nothing_heavy(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "deploykit", *command, "--help"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: deploykit")
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & HEAVY


def test_every_command_is_listed_with_its_help():
    from deploykit.cli import cli

    text = subprocess.run(
        [sys.executable, "-m", "deploykit", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for name in cli.list_commands(None):
        assert re.search(rf"^  {name} +\S", text, re.MULTILINE), name
        assert cli.get_command(None, name).help


def test_usage_errors_are_exit_code_2(run_cli, cli):
    assert "Traceback" not in run_cli().stderr
    assert run_cli("nosuch").returncode == 2
    for args in (["nosuch"], ["export"], ["export", "x.onnx"], ["quantize", "static", "-m", "x", "-o", "y"]):
        done = cli(*args)
        assert done.returncode == 2, (args, done)
        assert "Traceback" not in done.stderr
