"""`deploykit quantize static --engine`."""

import json


def test_the_second_engine_prints_nothing_of_its_own(run_cli, conv_model, tmp_path):
    command = ["quantize", "static", "-m", conv_model, "--data", "calib.npz", "--engine", "nncf", "--allow-slower"]
    done = run_cli(*command, "-o", "int8", "--json")
    assert done.returncode == 0, done.stderr
    step = json.loads(done.stdout)["manifest"]["lineage"][-1]
    assert step["params"]["engine"] == "nncf" and step["tools"]["nncf"]
    lines = done.stderr.splitlines()
    assert any(line.startswith("quantize with NNCF: ") for line in lines)
    assert not [line for line in lines if "INFO" in line or "WARNING" in line or "%" in line or "\u2501" in line]


def test_both_are_told(cli, conv_model, tmp_path):
    command = ["quantize", "static", "-m", conv_model, "--data", "calib.npz", "--engine", "both", "--gate-seconds", "0"]
    done = cli(*command, "-o", "int8")
    assert done.returncode == 0, done.stderr
    assert "is kept" in done.stderr and "is not: " in done.stderr


def test_what_it_does_not_know_is_refused(cli, conv_model, tmp_path):
    command = ["quantize", "static", "-m", conv_model, "--data", "calib.npz", "--engine", "nncf", "-o", "int8"]
    done = cli(*command, "--rounding", "adaround", "--calibration", "mse")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "knows no --calibration and no --rounding" in line and "--engine deploykit" in line
    assert not (tmp_path / "int8").exists()
    assert cli(*command[:-4], "--engine", "other", "-o", "int8").returncode == 2
