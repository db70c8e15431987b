"""`deploykit compare`: exit codes for CI, and output for a person, a pull request and a program."""

import json
import signal
from types import SimpleNamespace

import pytest

from deploykit.cli import main


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The command line in this process, in the folder of the reports."""

    def run(*args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=printed.out, stderr=printed.err)

    return run


@pytest.fixture
def reports(report_data, tmp_path):
    """old.json, same.json and slow.json."""
    for name, seed, scale in (("old", 1, 1.0), ("same", 2, 1.0), ("slow", 3, 1.3)):
        data = report_data.make_report(seed, scale=scale, rounds=10, samples=80)
        (tmp_path / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    return tmp_path


def test_exit_codes(run_cli, call, reports):
    assert call("compare", "old.json", "same.json", "--fail-if", "latency>10%").returncode == 0
    slow = run_cli("compare", "old.json", "slow.json", "--fail-if", "latency>10%", "--fail-if", "accuracy<-1pt")
    assert slow.returncode == 3
    assert slow.stderr == ""
    assert "FAILED: latency>10%, int8 on ort:cpu: +" in slow.stdout
    assert slow.stdout.endswith("failed: 3 of 6 checks\n")
    assert call("compare", "old.json", "slow.json").returncode == 0  # no condition, no failure
    for arguments, words in (
        (["old.json", "missing.json"], "missing.json does not exist"),
        (["old.json", "same.json", "--fail-if", "speed>1%"], "one of latency"),
        (["old.json", "same.json", "--match", "fp32"], "OLD=NEW"),
    ):
        done = call("compare", *arguments)
        assert done.returncode == 1
        assert words in done.stderr
    assert call("compare", "old.json").returncode == 2


def test_strict_takes_the_measured_change(call, reports):
    rule = ["compare", "old.json", "same.json", "--fail-if", "latency>-50%"]
    assert call(*rule).returncode == 3
    small = ["compare", "old.json", "slow.json", "--fail-if", "latency>28%"]
    assert call(*small).returncode == 0
    assert "not proven: latency>28%" in call(*small).stdout
    assert call(*small, "--strict").returncode == 3


def test_missing_candidates_and_other_machines(call, reports):
    data = json.loads((reports / "same.json").read_text())
    data["candidates"].pop(1)
    data["environment"]["machine"]["cpu"] = "Other"
    data["settings"]["batch"] = 2
    (reports / "other.json").write_text(json.dumps(data))
    command = ["compare", "old.json", "other.json", "--fail-if", "latency>30%"]
    done = call(*command)
    assert (done.returncode, "cpu Imagined CPU 1, now Other" in done.stderr) == (1, True)
    done = call(*command, "--allow-different-machine")
    assert (done.returncode, "batch 1, now 2" in done.stderr) == (1, True)
    allowed = [*command, "--allow-different-machine", "--allow-different-settings"]
    done = call(*allowed)
    assert done.returncode == 3
    assert "simple on ort:cpu: is not in the new report" in done.stdout
    assert call(*allowed, "--allow-missing").returncode == 0


def test_markdown_and_json(call, reports):
    base = ["compare", "old.json", "slow.json", "--fail-if", "latency>10%"]
    done = call(*base, "--markdown", "-")
    assert done.returncode == 3
    assert done.stdout.startswith("**failed: 3 of 3 checks**")
    assert call(*base, "--markdown", "pr.md").returncode == 3
    assert (reports / "pr.md").read_text(encoding="utf-8") == done.stdout
    assert call(*base, "--markdown", "pr.md").returncode == 1
    told = call(*base, "--json")
    assert told.returncode == 3
    data = json.loads(told.stdout)
    assert data["failed"]
    assert {j["outcome"] for j in data["judgements"]} == {"FAILED"}
    assert call(*base, "--json", "--markdown", "-").returncode == 2


def test_escape_sequences_in_names_are_spelled_out(call, reports):
    data = json.loads((reports / "old.json").read_text())
    for c in data["candidates"]:
        c["name"] = f"\x1b[31m{c['name']}"
    data["winner"]["candidates"] = ["\x1b[31mint8 on ort:cpu"]
    (reports / "evil.json").write_text(json.dumps(data))
    for arguments in (["report", "evil.json"], ["compare", "evil.json", "evil.json", "--fail-if", "latency>5%"]):
        done = call(*arguments)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
        assert "\\x1b[31mint8" in done.stdout


def test_the_function_is_public(reports):
    import deploykit

    found = deploykit.compare(reports / "old.json", reports / "slow.json", fail_if=["latency>10%"])
    assert found.failed
    assert not deploykit.compare(reports / "old.json", reports / "same.json", fail_if=["latency>10%"]).failed
    with pytest.raises(deploykit.DeploykitError, match="cannot read the condition"):
        deploykit.compare(reports / "old.json", reports / "same.json", fail_if=["latency"])
