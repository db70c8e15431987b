"""Peak memory of every step on weights over 2 GB: python benchmarks/suite/large_weights.py

Makes a model of some gigabytes, runs each command of the command line on it in a process of its own, and adds up the
memory of that process and of all its children, fifty times a second. Two peaks are given: "resident" is all pages
(VmRSS), "private" leaves out pages of files that are only mapped (VmRSS - RssFile), which the kernel takes back when
somebody else needs the memory. Needs 4 times the weights on disk, and about 2 times in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

_ROOT = Path(__file__).parents[2]
_WIDTH, _VOCABULARY = 4096, 8192
_LIMIT = 1.5

_FACTORY = """
import torch


class Deep(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding({vocabulary}, {width})
        self.layers = torch.nn.ModuleList(
            torch.nn.utils.skip_init(torch.nn.Linear, {width}, {width}, bias=False) for _ in range(layers)
        )
        first = torch.randn({width}, {width}) * (1.2 / {width}**0.5)
        for number, layer in enumerate(self.layers):
            layer.weight.data.copy_(torch.roll(first, 7 * number + 1, 1))

    def forward(self, ids):
        hidden = self.table(ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return hidden


def make():
    return Deep({layers}).eval(), (torch.randint(0, {vocabulary}, (2, 4)),)
"""


def write_model(path: Path, layers: int) -> int:
    """A token table and ``layers`` square matrices with Tanh between them; weights external, written one by one.

    Returns:
        Bytes of the weights.
    """
    import onnx
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    first = rng.standard_normal((_WIDTH, _WIDTH), dtype=np.float32) * np.float32(1.2 / _WIDTH**0.5)
    weights, nodes = [], [helper.make_node("Gather", ["table", "ids"], ["h0"], name="embed")]
    data = path.with_name(f"{path.name}.data")
    with data.open("wb") as stream:

        def add(name: str, array: np.ndarray) -> None:
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", stream.tell()), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            stream.write(array.tobytes())
            weights.append(tensor)

        add("table", rng.standard_normal((_VOCABULARY, _WIDTH), dtype=np.float32))
        for i in range(layers):
            add(f"w{i}", np.roll(first, 7 * i + 1, axis=1))
            nodes += [
                helper.make_node("Identity", [f"h{i}"], [f"i{i}"], name=f"same{i}"),
                helper.make_node("MatMul", [f"i{i}", f"w{i}"], [f"m{i}"], name=f"matmul{i}"),
                helper.make_node("Tanh", [f"m{i}"], [f"h{i + 1}"], name=f"tanh{i}"),
            ]
    graph = helper.make_graph(
        nodes,
        "deep",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info(f"h{layers}", TensorProto.FLOAT, ["batch", "sequence", _WIDTH])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return data.stat().st_size


def measure(command: list[str]) -> tuple[int, int, float, int, str]:
    """Run a command.

    Returns:
        Peak resident and private bytes of its process tree, seconds, exit code, and its last line on standard error.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, cwd=_ROOT, stdout=said, stderr=said)
        resident = private = 0
        while child.poll() is None:
            now = [_memory(pid) for pid in _tree(child.pid)]
            resident = max(resident, sum(r for r, _ in now))
            private = max(private, sum(p for _, p in now))
            time.sleep(0.02)
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    return resident, private, time.monotonic() - started, child.returncode, lines[-1] if lines else ""


def _tree(pid: int) -> list[int]:
    found = [pid]
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += _tree(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def _memory(pid: int) -> tuple[int, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    sizes = {key: int(rest.split()[0]) * 1024 for key, _, rest in (x.partition(":") for x in lines) if "kB" in rest}
    return sizes.get("VmRSS", 0), sizes.get("VmRSS", 0) - sizes.get("RssFile", 0)


def steps(folder: Path, source: str) -> list[tuple[str, list[str]]]:
    """Commands by name, in an order in which each finds what it needs."""
    np.savez(folder / "data.npz", ids=np.random.default_rng(1).integers(0, _VOCABULARY, (4, 4)))
    exported = str(folder / "exported")
    commands = {
        "export": ["export", source, "-o", exported],
        "verify": ["verify", "-m", exported],
        "simplify": ["simplify", "-m", exported, "-o", str(folder / "simplified")],
        "quantize dynamic": ["quantize", "dynamic", "-m", exported, "-o", str(folder / "dynamic")],
        "quantize weights": ["quantize", "weights", "-m", exported, "-o", str(folder / "packed")],
        "quantize half": ["quantize", "half", "-m", exported, "-o", str(folder / "half")],
        "quantize static": [
            "quantize",
            "static",
            "-m",
            exported,
            "-o",
            str(folder / "static"),
            "--data",
            str(folder / "data.npz"),
        ],
    }
    return [(name, [sys.executable, "-m", "deploykit", *rest]) for name, rest in commands.items()]


def main() -> int:
    """Run all steps; 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.5, help="size of the weights in 10**9 bytes")
    parser.add_argument("--source", choices=("onnx", "torch"), default="onnx")
    parser.add_argument("--step", action="append", help="only these steps")
    parser.add_argument("--dir", type=Path, help="where to work; a temporary directory by default")
    parser.add_argument("--json", type=Path, help="write the table as JSON too")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="deploykit-large-", dir=args.dir))
    layers = max(1, round((args.gb * 1e9 / 4 - _VOCABULARY * _WIDTH) / _WIDTH**2))
    rows = []
    try:
        if args.source == "onnx":
            weights = write_model(folder / "model.onnx", layers)
            source = str(folder / "model.onnx")
        else:
            weights = 4 * (_VOCABULARY * _WIDTH + layers * _WIDTH**2)
            (folder / "large.py").write_text(_FACTORY.format(vocabulary=_VOCABULARY, width=_WIDTH, layers=layers))
            source = f"{folder / 'large.py'}:make"
        print(f"{'step':17} weights GB  resident GB  ratio  private GB  ratio  seconds", flush=True)
        for name, command in steps(folder, source):
            if args.step and name not in args.step and name != "export":
                continue
            resident, private, seconds, code, last = measure(command)
            ratios = resident / weights, private / weights
            rows.append(
                {
                    "step": name,
                    "weights": weights,
                    "resident": resident,
                    "private": private,
                    "seconds": seconds,
                    "exit": code,
                }
            )
            print(
                f"{name:17} {weights / 1e9:10.2f} {resident / 1e9:12.2f} {ratios[0]:6.2f} {private / 1e9:11.2f} "
                f"{ratios[1]:6.2f} {seconds:8.0f}{'' if not code else f'  exit {code}: {last}'}",
                flush=True,
            )
            for made in ("simplified", "dynamic", "packed", "half", "static"):
                shutil.rmtree(folder / made, ignore_errors=True)
        print("package           there is no such command yet")
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        over = [r["step"] for r in rows if r["resident"] > _LIMIT * weights]
        print(f"over {_LIMIT} times the weights: {', '.join(over) or 'none'}")
        return 1 if any(r["exit"] for r in rows) else 0
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
