"""Optional dependencies: what importing them must not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).parents[2]
LOAD_WORKER = ROOT / "deploykit" / "load_worker.py"

_SEEN = """
import importlib.util, json, sys, threading
{load}
print(json.dumps({{
    "sends": sorted(m for m in sys.modules if m.startswith("openvino_telemetry")),
    "forks": "multiprocessing.popen_fork" in sys.modules,
    "threads": threading.active_count(),
    "there": importlib.util.find_spec("openvino_telemetry") is not None,
}}))
"""


@pytest.mark.parametrize(
    "load",
    [
        "from deploykit.extras import require; require('openvino', extra='openvino').Core()",
        "from deploykit.runtimes import default_devices; default_devices()",
        "from deploykit.optimizers import require_nncf; require_nncf()",
    ],
)
def test_openvino_reports_nothing(load: str) -> None:
    """It would tell its maker of the import, in a forked process that Python waits for when it ends."""
    pytest.importorskip("openvino_telemetry")
    pytest.importorskip("openvino")
    code = _SEEN.format(load=load)
    # Without CI=true, which turns the reports off.
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ran.stdout.strip() == '{"sends": [], "forks": false, "threads": 1, "there": true}'


def test_onnxruntime_reports_nothing(tmp_path: Path) -> None:
    """From 1.29 on it would keep what it reports below the home directory until it is sent."""
    text = '<ir_version: 9, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Abs(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    code = "from deploykit import open_session; print(open_session('m.onnx', 'ort:cpu').signature)"
    for words in (["-c", code], [str(LOAD_WORKER), "ort", "m.onnx"]):
        ran = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True,
            # Without CI=true, which turns the reports off.
            env={"PATH": "", "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert ran.stdout
        assert not (tmp_path / "home").exists()


def test_inspect_reports_nothing(tmp_path: Path) -> None:
    pytest.importorskip("openvino_telemetry")
    code = (
        "import runpy, sys; sys.argv = ['w', 'openvino', 'none.onnx']\n"
        f"runpy.run_path({str(ROOT / 'deploykit' / 'load_worker.py')!r}, run_name='__main__')\n"
        "print([m for m in sys.modules if m.startswith('openvino_telemetry.')])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    assert ran.stdout.splitlines()[-1] == "[]"
