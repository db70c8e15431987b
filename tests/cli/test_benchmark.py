"""`deploykit benchmark` as a process: what it refuses, keeps, and goes on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

QUICK = ("--device", "ort:cpu", "--rounds", "3", "--seconds", "0.02", "--warmup", "0")


def test_a_report_and_its_views_come_out_of_one_run(cli, measured):
    assert measured.returncode == 0, measured.stderr
    report = json.loads((measured.path / "r.json").read_text())
    assert report["schema_version"] == 2
    assert report["candidates"][0]["placement"]["share_of_nodes"] == 1
    assert "100%/100%" in measured.stdout
    page, table = ((measured.path / name).read_text(encoding="utf-8") for name in ("r.html", "r.md"))
    assert page.startswith("<!doctype html>")
    assert "net.onnx" in table
    assert not list(measured.path.glob("*.partial"))
    again = cli("report", measured.path / "r.json", "--html", "again.html", "--markdown", "again.md")
    assert again.returncode == 0, again.stderr
    assert Path("again.md").read_text(encoding="utf-8") == table
    # Up to the embedded copy, in which the reader may fill in what an older version did not write.
    pages = [p.split('<script type="application/json"') for p in (Path("again.html").read_text("utf-8"), page)]
    assert pages[0][0] == pages[1][0]
    assert len(pages[0]) == 2


def test_wrong_candidates_are_left_out(measured):
    assert measured.returncode == 0, measured.stderr
    report = json.loads((measured.path / "r.json").read_text())
    assert report["candidates"][1]["status"].startswith("wrong outputs")
    assert "rounds" not in report["candidates"][1]
    assert report["winner"]["candidates"] == ["net.onnx on ort:cpu"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scenario", "server"], "needs an objective"),
        (["--slo-p99-ms", "5"], "objective of 5.0 ms"),
        (["--concurrency", "2"], "in the scenario latency"),
        (["--scenario", "server", "--slo-p99-ms", "5", "--tune"], "cannot be tuned"),
        (["--tuned", "none.json"], "does not exist"),
        (["--resume"], "--resume without --output"),
        (["--resume", "-o", "new.json"], "nothing to resume"),
        (["--resume", "-o", "other.json"], "not the report of an interrupted run"),
        (["-o", "other.json"], "exists"),
        (["--tune", "--save-settings", "other.json"], "exists"),
        (["-o", "begun.json"], "holds rounds of an interrupted run"),
        (["-o", "begun.json", "--resume"], "cannot read"),
    ],
)
def test_bad_options_are_one_line(cli, conv_model, tmp_path, options, said):
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "begun.json.partial").write_text("{")
    done = cli("benchmark", "-m", conv_model, *QUICK, *options)
    assert done.returncode == 1, done.stdout
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert sorted(p.name for p in tmp_path.glob("*.json*")) == ["begun.json.partial", "other.json"]


def test_settings_are_found_kept_and_used(cli, conv_model, tmp_path):
    done = cli(
        "benchmark", "-m", conv_model, "--device", "ort:cpu", "--tune", "--budget", "3s", "--save-settings", "s.json",
        "-o", "r.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tuning = json.loads((tmp_path / "r.json").read_text())["tuning"]
    assert tuning["budget_s"] == 3
    assert {t["stage"] for t in tuning["trials"]} >= {"threads"}
    kept = json.loads((tmp_path / "s.json").read_text())
    assert kept["device"] == "ort:cpu"
    again = cli("benchmark", "-m", conv_model, *QUICK, "--tuned", "s.json", "--json")
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    assert [c["name"] for c in report["candidates"]] == ["net.onnx", "net.onnx tuned"]
    assert report["candidates"][1]["tuned"]["threads"] == kept["threads"]
    other = cli("benchmark", "-m", conv_model, "--device", "openvino:cpu", "--tuned", "s.json")
    assert other.returncode == 1
    assert "s.json is for ort:cpu, which is not measured" in other.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_ended_goes_on(cli, conv_model, tmp_path, sent):
    """Ctrl-C, or the worst: what was measured is kept beside the report, and the processes are gone."""
    command = ["benchmark", "-m", str(conv_model), *QUICK[:2], "--rounds", "60", *QUICK[4:], "-o", "r.json"]
    child = subprocess.Popen(
        [sys.executable, "-m", "deploykit", *command], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    journal = tmp_path / "r.json.partial"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (journal.exists() and _rounds(journal) >= 1):
        time.sleep(0.05)
    os.kill(child.pid, sent)
    child.communicate(timeout=60)
    assert child.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    before = _rounds(journal)
    assert 1 <= before < 60
    other = cli(*command, "--resume", "--seed", "5")
    assert other.returncode == 1
    assert "another measurement: other settings" in other.stderr
    # As it was, but for what is not part of the measurement; fewer rounds would be another one.
    rounds = max(3, before + 1)
    kept = json.loads(journal.read_text())
    kept["key"]["settings"]["rounds"] = rounds
    journal.write_text(json.dumps(kept))
    command[command.index("60")] = str(rounds)
    done = cli(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"{before} of {rounds} rounds were there already" in done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["candidates"][0]["rounds"]) == rounds
    assert not journal.exists()


def _rounds(journal):
    return len(json.loads(journal.read_text())["entries"][0]["rounds"])


@pytest.mark.parametrize(
    ("text", "wanted"), [("90", 90), ("90s", 90), ("1.5m", 90), ("1H", 3600), (120.0, 120), ("x", None), ("-1s", None)]
)
def test_times_are_read_with_their_units(text, wanted):
    import click

    from deploykit.cli.common import seconds

    if wanted is None:
        with pytest.raises(click.BadParameter):
            seconds(text)
    else:
        assert seconds(text) == wanted


@pytest.mark.parametrize("options", [("--budget", "9s"), ("--tune", "--confirm")])
def test_options_that_would_be_ignored_are_wrong_usage(cli, conv_model, options):
    done = cli("benchmark", "-m", conv_model, *options)
    assert done.returncode == 2
    assert options[-1 if len(options[-1]) > 3 else 0] in done.stderr
