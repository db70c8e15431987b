import json

from deploykit.machine import inspect_machine
from deploykit.runtimes.probe import advice, clashes


def test_doctor_tells_what_is_here(run_cli, cli):
    done = run_cli("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    usable = {d["device"] for d in found["devices"] if d["usable"]}
    assert {"ort:cpu", "openvino:cpu"} <= usable
    assert all(d["detail"] for d in found["devices"])
    assert found["machine"]["cores_allowed"] >= 1
    assert "problem" not in cli("doctor").stdout


def test_two_onnxruntime_wheels_clash():
    assert clashes(["onnxruntime"]) == []
    (text,) = clashes(["onnxruntime", "onnxruntime-gpu"])
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in text


def test_a_missing_vnni_is_said():
    import dataclasses

    machine = inspect_machine()
    without = dataclasses.replace(machine, architecture="x86_64", flags=dict.fromkeys(machine.flags, False))
    assert any("VNNI" in text for text in advice(without))
    having = dataclasses.replace(without, flags={**without.flags, "vnni": True})
    assert not any("VNNI" in text for text in advice(having))
