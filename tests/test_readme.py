"""The README's tour works: every block marked `bash` or `python` after "## Tour" is run, in order, in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks():
    tour = (ROOT / "README.md").read_text(encoding="utf-8").split("## Tour", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```(bash|python)(?: file=(\S+))?\n(.*?)```", tour, re.DOTALL)


def test_tour(tmp_path):
    found = blocks()
    assert len(found) >= 6
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # The net is trained three times: torch's threads wait for one another where other tests take the cores.
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    for kind, file, code in found:
        if file:
            (tmp_path / file).write_text(code, encoding="utf-8")
            continue
        command = ["bash", "-euo", "pipefail", "-c", code] if kind == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_public_names_are_pinned():
    import deploykit

    assert deploykit.__all__ == [
        "Artifact", "Dataset", "DeploykitError", "Recipe", "Report", "Session", "Signature", "TensorSpec",
        "__version__", "apply", "benchmark", "check_signature", "compare", "distill", "export", "export_parts",
        "finetune", "fuse", "load", "open_session", "optimize", "pack_data", "package", "preprocess", "prune",
        "quantize_dynamic", "quantize_half", "quantize_qat", "quantize_repair", "quantize_static",
        "quantize_sweep", "quantize_weights", "run", "sbom", "select_data", "serve", "show_data", "sign",
        "simplify", "smoke", "verify",
    ]  # fmt: skip
    for name in deploykit.__all__:
        assert getattr(deploykit, name) is not None
