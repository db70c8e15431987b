"""What `Session.run` adds to a runtime's own call: session_overhead.py [--blocks N] [--device D] [--json FILE]

Models so small that the call is all there is: one addition of four floats, and eight inputs with four outputs. For each
runtime, blocks of our call and of the bare one follow each other in random order in one process; printed are medians
over blocks in microseconds, and the difference within pairs of blocks, with a 95 % bootstrap interval over pairs.

The bare calls: `InferenceSession.run(None, feeds)` on a session with the same options; `InferRequest.infer(feeds)` with
shared inputs, which is OpenVINO's faster way, on the same compiled model; the module that a `.pt2` program gives, on
tensors that share the arrays' memory. Ends with 1 where a difference is 10 us or more, by its interval's upper end.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from deploykit.runtimes import open_session, require_device

LIMIT_US = 10.0
_CALLS, _WARMUP = 400, 40
Feeds = dict[str, Any]


def make_onnx(path: Path, inputs: int, outputs: int) -> None:
    """Every output is the sum of some inputs; every input is in one."""
    shares = [[f"x{i}" for i in range(inputs) if i % outputs == number] for number in range(outputs)]
    nodes = [helper.make_node("Sum", [*share, share[0]], [f"y{number}"]) for number, share in enumerate(shares)]
    values = [
        [helper.make_tensor_value_info(f"{letter}{i}", TensorProto.FLOAT, [4]) for i in range(count)]
        for letter, count in (("x", inputs), ("y", outputs))
    ]
    graph = helper.make_graph(nodes, "tiny", values[0], values[1])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def make_program(path: Path) -> None:
    """One addition, as a program."""
    import torch

    class Twice(torch.nn.Module):
        def forward(self, x0: Any) -> Any:
            return x0 + x0

    torch.export.save(torch.export.export(Twice(), (torch.ones(4),)), path)


def bare_onnxruntime(path: Path, session: Any) -> Callable[[Feeds], Any]:
    """The runtime's own call, with our session's options."""
    import onnxruntime

    found = onnxruntime.InferenceSession(
        str(path), session._plan.apply(onnxruntime), providers=["CPUExecutionProvider"]
    )
    return lambda feeds: found.run(None, feeds)


def bare_openvino(path: Path, session: Any) -> Callable[[Feeds], Any]:
    """The runtime's own call, in its faster way."""
    request = session._compiled.create_infer_request()
    return lambda feeds: request.infer(feeds, share_inputs=True)


def bare_torch(path: Path, session: Any) -> Callable[[Feeds], Any]:
    """The program's module on tensors over the arrays."""
    import torch

    module = torch.export.load(str(path)).module()

    def run(feeds: Feeds) -> Any:
        with torch.inference_mode():
            return module(*(torch.from_numpy(a) for a in feeds.values())).numpy()

    return run


def block(run: Callable[[Feeds], Any], feeds: Feeds) -> float:
    """Median of one block of calls, in microseconds."""
    clock = time.perf_counter_ns
    for _ in range(_WARMUP):
        run(feeds)
    found = []
    for _ in range(_CALLS):
        begun = clock()
        run(feeds)
        found.append(clock() - begun)
    return float(np.median(found)) / 1e3


def interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """95 % bootstrap of the median."""
    rng = np.random.default_rng(0)
    draws = np.median(rng.choice(values, (4000, len(values))), axis=1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def measure(name: str, device: str, path: Path, bare_of: Any, blocks: int, order: random.Random) -> dict[str, Any]:
    """Interleaved blocks of both calls."""
    with open_session(path, device, threads=1) as session:
        feeds = {s.name: np.ones(4, np.float32) for s in session.signature.inputs}
        calls = {"ours": session.run, "bare": bare_of(path, session)}
        found: dict[str, list[float]] = {"ours": [], "bare": []}
        for _ in range(blocks):
            for which in order.sample(list(calls), 2):
                found[which].append(block(calls[which], feeds))
    added = np.array(found["ours"]) - np.array(found["bare"])
    low, high = interval(added)
    return {
        "model": name, "device": device, "bare_us": float(np.median(found["bare"])),
        "ours_us": float(np.median(found["ours"])), "added_us": float(np.median(added)), "low": low, "high": high,
    }  # fmt: skip


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--device", action="append", choices=["ort:cpu", "openvino:cpu", "torch:cpu"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bare = {"ort:cpu": bare_onnxruntime, "openvino:cpu": bare_openvino, "torch:cpu": bare_torch}
    order = random.Random(options.seed)
    rows = []
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        folder = Path(name)
        models = {"1 in, 1 out": folder / "one.onnx", "8 in, 4 out": folder / "many.onnx"}
        make_onnx(models["1 in, 1 out"], 1, 1)
        make_onnx(models["8 in, 4 out"], 8, 4)
        print(f"{'model':12} {'device':13} {'bare us':>8} {'ours us':>8} {'added us':>9}  95 % interval")
        for device in options.device or list(bare):
            require_device(device)
            chosen = models
            if device == "torch:cpu":
                make_program(folder / "one.pt2")
                chosen = {"1 in, 1 out": folder / "one.pt2"}
            for label, path in chosen.items():
                row = measure(label, device, path, bare[device], options.blocks, order)
                rows.append(row)
                print(
                    f"{label:12} {device:13} {row['bare_us']:8.2f} {row['ours_us']:8.2f} {row['added_us']:9.2f}  "
                    f"[{row['low']:.2f}, {row['high']:.2f}]",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    within = all(row["high"] < LIMIT_US for row in rows)
    print(f"all under {LIMIT_US:g} us" if within else f"NOT all under {LIMIT_US:g} us")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
