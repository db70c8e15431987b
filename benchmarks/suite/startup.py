"""What it costs to start: python benchmarks/suite/startup.py [--rounds N] [--json FILE]

Every row is a fresh process, timed from outside, once a round in random order: Python alone; `deploykit --help`;
imports; and a small model loaded and run once, by the runtime alone and by `open_session`. Printed are medians over
rounds in milliseconds, the median of the ratio within rounds to a bare process of the same kind (Python, numpy, or the
runtime without us), and what we add to that, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

_BARE_ORT = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {"x": numpy.ones((1, 64), numpy.float32)})
"""
_BARE_OPENVINO = """
import sys, numpy, openvino
config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
compiled = openvino.Core().compile_model(sys.argv[1], "CPU", config)
compiled.create_infer_request().infer({"x": numpy.ones((1, 64), numpy.float32)})
"""
_OURS = """
import sys, numpy
from deploykit.runtimes import open_session
with open_session(sys.argv[1], sys.argv[2], threads=1) as session:
    session.run({"x": numpy.ones((1, 64), numpy.float32)})
"""


def make(path: Path) -> None:
    """A small network: three dense layers of 64."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    names = ["x", "a", "b", "y"]
    graph = helper.make_graph(
        [helper.make_node("Gemm", [names[i], f"w{i}"], [names[i + 1]]) for i in range(3)],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [numpy_helper.from_array(rng.normal(size=(64, 64)).astype(np.float32), f"w{i}") for i in range(3)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def commands(model: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments of Python, and the row that is the base, by name."""
    small, file = ["-c"], str(model)
    return {
        "python": ([*small, "pass"], "python"),
        "import numpy": ([*small, "import numpy"], "python"),
        "deploykit --help": (["-m", "deploykit", "--help"], "python"),
        "import deploykit": ([*small, "import deploykit"], "python"),
        "import deploykit.runtimes": ([*small, "import deploykit.runtimes"], "import numpy"),
        "onnxruntime, first run": ([*small, _BARE_ORT, file], "onnxruntime, first run"),
        "ort:cpu, first run": ([*small, _OURS, file, "ort:cpu"], "onnxruntime, first run"),
        "openvino, first run": ([*small, _BARE_OPENVINO, file], "openvino, first run"),
        "openvino:cpu, first run": ([*small, _OURS, file, "openvino:cpu"], "openvino, first run"),
    }


def timed(arguments: list[str]) -> float:
    """Milliseconds of one process, from outside.

    Raises:
        RuntimeError: It failed.
    """
    home = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)
    spent = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(f"{arguments[-1]}: {done.stderr.strip()[-300:]}")
    return spent * 1e3


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    order = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        make(Path(name) / "small.onnx")
        chosen = commands(Path(name) / "small.onnx")
        for arguments, _ in chosen.values():  # files come into the page cache, and byte code is written
            timed(arguments)
        found: dict[str, list[float]] = {label: [] for label in chosen}
        for _ in range(options.rounds):
            for label in order.sample(list(chosen), len(chosen)):
                found[label].append(timed(chosen[label][0]))
    rows: list[dict[str, Any]] = []
    print(f"{'process':26} {'ms':>8} {'ratio':>7} {'added ms':>9}  to")
    for label, (_, base) in chosen.items():
        mine, theirs = np.array(found[label]), np.array(found[base])
        row = {
            "process": label, "ms": float(np.median(mine)), "base": base,
            "ratio": float(np.median(mine / theirs)), "added_ms": float(np.median(mine - theirs)),
        }  # fmt: skip
        rows.append(row)
        print(f"{label:26} {row['ms']:8.1f} {row['ratio']:7.2f} {row['added_ms']:9.1f}  {base}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
