"""Optional dependencies: what importing them must not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

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
