"""`package` and `smoke` as commands: exit codes, one line for what is wrong, and nothing half-written."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest


@pytest.fixture
def exported(artifact):
    return artifact().path


@pytest.fixture
def run_cli(tmp_path):
    """Run `python -m deploykit ...` in the folder of the artifact."""

    def run(*args, preexec=None):
        return subprocess.run(
            [sys.executable, "-m", "deploykit", *map(str, args)],
            capture_output=True, text=True, check=False, cwd=tmp_path, preexec_fn=preexec, timeout=300,
        )  # fmt: skip

    return run


def refused(done, folder, *words):
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line, line
    assert not (folder / "out").exists()
    assert not list(folder.glob(".out*"))


def test_from_an_artifact_to_a_tested_bundle(run_cli, cli, exported, tmp_path):
    done = run_cli("package", "net", "--target", "triton", "-o", "out", "--max-batch", "4")
    assert done.returncode == 0, done.stderr
    assert "up to 4 rows" in done.stdout
    assert "passed on ort:cpu" in done.stdout
    done = run_cli("smoke", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("passed: ")
    assert "max deviation" in done.stdout
    record = json.loads(cli("smoke", "out", "--json").stdout)
    assert record["passed"] is True
    assert record["target"] == "triton"


def test_the_manifest_as_json(cli, exported):
    done = cli("package", "net", "--target", "ovms", "-o", "out", "--name", "digits", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bundle"] == "out"
    assert (found["manifest"]["name"], found["manifest"]["target"]) == ("digits", "ovms")


def test_a_wrong_answer_is_exit_code_1(cli, exported, tmp_path):
    """The artifact's golden outputs are another model's."""
    import hashlib

    with np.load(exported / "golden.npz") as golden:
        changed = {k: golden[k] + 1 if "/out/" in k else golden[k] for k in golden.files}
    np.savez(exported / "golden.npz", **changed)
    manifest = json.loads((exported / "manifest.json").read_text())
    data = (exported / "golden.npz").read_bytes()
    manifest["files"]["golden.npz"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (exported / "manifest.json").write_text(json.dumps(manifest))
    refused(cli("package", "net", "--target", "triton", "-o", "out"), tmp_path, "golden requests", "--min-cosine")
    done = cli("smoke", "net")
    refused(done, tmp_path, "does not answer its golden requests")
    assert done.stdout.startswith("failed: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch", "--target", "triton"], ["nosuch does not exist"]),
        (["net.onnx", "--target", "triton"], ["deploykit export net.onnx"]),
        (["net", "--target", "triton", "--settings", "nosuch.json"], ["nosuch.json does not exist"]),
        (["net", "--target", "ovms", "--device", "ort:cpu"], ["OpenVINO Model Server has no ort:cpu"]),
        (["net", "--target", "triton", "--device", "nosuch"], ["unknown device"]),
        (["net", "--target", "triton", "--storage-uri", "s3://x"], ["--storage-uri means nothing to triton", "kserve"]),
        (["net", "--target", "kserve", "--name", "Net"], ["--name net"]),
        (["net", "--target", "mlflow", "--max-batch", "4"], ["MLflow does not join requests"]),
        (["net", "--target", "docker", "--lock", "nosuch.txt"], ["nosuch.txt"]),
        (["net", "--target", "docker", "--base-image", "python:3.11"], ["sha256"]),
    ],
)
def test_what_cannot_be_packaged(cli, exported, tmp_path, arguments, words):
    refused(cli("package", *arguments, "-o", "out"), tmp_path, *words)


def test_usage(cli):
    for arguments in (
        ["package"], ["package", "net", "-o", "out"], ["package", "net", "--target", "nosuch", "-o", "out"],
        ["package", "net", "--target", "triton"], ["smoke"], ["smoke", "out", "--wire", "morse"],
        ["package", "net", "--target", "triton", "-o", "out", "--max-batch", "-1"],
    ):  # fmt: skip
        done = cli(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)


def test_the_choices_are_the_table():
    from deploykit.cli.package import command
    from deploykit.serving.package_targets import TARGETS

    (option,) = [p for p in command.params if p.name == "target"]
    assert sorted(option.type.choices) == sorted(TARGETS)


def test_what_is_there_is_left_alone(cli, exported, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("keep")
    done = cli("package", "net", "--target", "triton", "-o", "out")
    assert done.returncode == 1
    assert "exists" in done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


def test_full_disk(run_cli, exported, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    done = run_cli("package", "net", "--target", "triton", "-o", "out", preexec=limit)
    refused(done, tmp_path, "cannot write", "nothing was left behind")


def test_an_interrupt_leaves_nothing(exported, tmp_path):
    """While the package index is asked, which is a program that never answers."""
    slow = tmp_path / "bin"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import pathlib, sys, time\n"
        "if sys.argv[:1] == ['-m'] and 'pip' in sys.orig_argv:\n"
        f"    pathlib.Path({str(tmp_path / 'asked')!r}).touch()\n"
        "    time.sleep(600)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(slow), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        [sys.executable, "-m", "deploykit", "package", "net", "--target", "docker", "-o", "out"],
        cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while not (tmp_path / "asked").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "nothing half-written is left" in said
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_token_comes_from_the_environment(cli, exported, tmp_path):
    assert cli("package", "net", "--target", "triton", "-o", "bundle").returncode == 0
    done = cli("smoke", "bundle", "--url", "http://127.0.0.1:1", "--token-env", "NO_SUCH_VARIABLE")
    refused(done, tmp_path, "NO_SUCH_VARIABLE is not set")
