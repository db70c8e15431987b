"""What serving costs and stands: python benchmarks/suite/server.py [latency|throughput|overload|faults ...]

latency     One float32 tensor of 600 KB there and back, by a model that is next to nothing, one client on one
            connection. Calls of a bare session in this process and of `deploykit serve` over HTTP and gRPC follow each
            other in turns; told is the median of each, less that of the bare session. The same bytes between two
            processes without any server, and over gRPC with a method that does nothing, tell what the ways themselves
            cost; clients that only make system calls, or hand ready bytes to gRPC, tell what tritonclient costs. The
            clients' process keeps freed memory, as the server does: what page faults cost in clients is another
            matter, which `--usual-memory` shows.
throughput  MiniLM in int8: 32 clients that send a sentence each, against the offline scenario of
            `deploykit benchmark` with the same batch, threads and sessions, in turns.
overload    Requests at twice the rate that is answered, whatever the server does: memory, refusals, the 99th percentile
            of what is accepted and the bound that the queue gives it.
faults      SIGTERM, a new version, SIGHUP and kill -9 of a worker while clients ask: what was accepted and lost.

Ends with 1 where a goal is not met. The figures are of the machine that is printed, with its load: on a busy one take
the ratios.
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
from server_clients import Load, RawHttp, Told, infer_request, ready_grpc, spread
from server_faults import faults
from server_process import SHAPE, SLOTS, Echo, Server, layers, machine, relu

import deploykit
from deploykit.artifact import Artifact
from deploykit.progress import TerminalProgress
from deploykit.runtimes import open_session
from deploykit.serving.memory import keep_freed_memory

LATENCY_MS, SHARE, FLAT = 1.0, 0.9, 0.05


# --- latency ----------------------------------------------------------------------------------------------------------


def latency(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians over turns, in milliseconds, and what each is above the bare session."""
    import tritonclient.grpc
    import tritonclient.http

    if not options.usual_memory:
        keep_freed_memory()
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    model = relu(folder / "net.onnx")
    request = infer_request("net", {"x": x})
    with Server(model, "--threads", "1", log=folder / "latency.log") as server:
        echo, grpc_echo = Echo(len(request), x.nbytes + 300), Echo(0, x.nbytes, grpc=True)
        raw = RawHttp(server.http)
        over_http = tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.http}")
        over_grpc = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        wire = echo.link()
        calls: dict[str, Callable[[], Any]] = {
            "the wire alone": lambda: wire(request),
            "gRPC alone": ready_grpc(grpc_echo.port, x),
            "HTTP, system calls only": lambda: raw.ask(request),
            "HTTP, tritonclient": lambda: ask_triton(tritonclient.http, over_http, x, binary=True),
            "gRPC, ready bytes": ready_grpc(server.grpc, x),
            "gRPC, tritonclient": lambda: ask_triton(tritonclient.grpc, over_grpc, x, binary=False),
            "encode HTTP": lambda: encode_http(tritonclient.http, x),
        }
        with open_session(model, "ort:cpu", threads=1) as session:
            calls = {"bare session": lambda: session.run({"x": x}), **calls}
            for label in ("HTTP, tritonclient", "gRPC, tritonclient"):
                np.testing.assert_array_equal(calls[label](), np.maximum(x, 0))
            before = server.metrics()
            found = in_turns(calls, options.turns, options.calls)
            after = server.metrics()
        for client in (over_http, over_grpc, raw):
            client.close()
        echo.end()
        grpc_echo.end()
    inside = {
        name: 1e3 * (after[f"deploykit_{name}_seconds_sum"] - before[f"deploykit_{name}_seconds_sum"])
        / (after[f"deploykit_{name}_seconds_count"] - before[f"deploykit_{name}_seconds_count"])
        for name in ("queue", "compute")
    }  # fmt: skip
    bare = np.array(found["bare session"])
    figures: dict[str, Any] = {}
    print(f"{'ms':28} {'p50':>7}  {'above the bare session: median over turns [10 %, 90 % of turns]'}")
    for label, medians in found.items():
        above = spread(np.array(medians) - bare)
        figures[label] = {"p50_ms": float(np.median(medians)), "above_ms": above}
        print(f"{label:28} {np.median(medians):7.3f}  {above['p50']:7.3f} [{above['p10']:.3f}, {above['p90']:.3f}]")
    print(f"in the server, means: {inside['queue']:.3f} ms in the queue, {inside['compute']:.3f} ms in the model")
    met = {
        f"{label} under {LATENCY_MS} ms": figures[label]["above_ms"]["p50"] < LATENCY_MS
        for label in ("HTTP, system calls only", "HTTP, tritonclient", "gRPC, ready bytes", "gRPC, tritonclient")
    }
    return {"figures": figures, "inside_ms": inside, "met": met}


def in_turns(calls: dict[str, Callable[[], Any]], turns: int, count: int) -> dict[str, list[float]]:
    """The median of each call in each turn, in milliseconds; a turn has all calls, in an order of its own."""
    draw = random.Random(0)
    found: dict[str, list[float]] = {label: [] for label in calls}
    for turn in range(turns + 1):
        for label in draw.sample(list(calls), len(calls)):
            took = []
            for _ in range(count):
                started = time.perf_counter_ns()
                calls[label]()
                took.append(time.perf_counter_ns() - started)
            if turn:  # the first is to warm up
                found[label].append(float(np.median(took)) / 1e6)
    return found


def ask_triton(module: Any, client: Any, x: np.ndarray, *, binary: bool) -> np.ndarray:
    """A whole request, from an array to an array."""
    given, taken = triton_tensors(module, x, binary=binary)
    found: np.ndarray = client.infer("net", [given], outputs=[taken]).as_numpy("y")
    return found


def triton_tensors(module: Any, x: np.ndarray, *, binary: bool) -> tuple[Any, Any]:
    """The input and the output that is asked for."""
    given = module.InferInput("x", list(x.shape), "FP32")
    if binary:
        given.set_data_from_numpy(x, binary_data=True)
        return given, module.InferRequestedOutput("y", binary_data=True)
    given.set_data_from_numpy(x)
    return given, module.InferRequestedOutput("y")


def encode_http(module: Any, x: np.ndarray) -> None:
    """What tritonclient does before it sends."""
    given, taken = triton_tensors(module, x, binary=True)
    module.InferenceServerClient.generate_request_body([given], outputs=[taken])


# --- throughput -------------------------------------------------------------------------------------------------------


def sentences(folder: Path) -> dict[str, np.ndarray]:
    """64 lines of text, 64 tokens each, which are also written to `data.npz`."""
    sys.path.insert(0, str(Path(__file__).parent))
    import quantized_shapes

    data = quantized_shapes.sentences()
    np.savez(folder / "data.npz", **data)
    return data


def minilm(folder: Path) -> Artifact:
    """MiniLM in int8, calibrated on the sentences."""
    sentences(folder)
    import real_models

    told = TerminalProgress()
    raw = deploykit.export(str(real_models._minilm_folder()), folder / "raw", progress=told)
    fp32 = deploykit.simplify(raw.path, folder / "fp32", progress=told)
    return deploykit.quantize_static(
        fp32.path, folder / "minilm", data=folder / "data.npz", min_cosine=-1, gate_seconds=0, progress=told
    )


def throughput(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Sentences a second, of the server and of the offline scenario, with the same settings."""
    model = Artifact.open(options.model) if options.model else minilm(folder)
    told = TerminalProgress()
    data = sentences(folder)
    request = infer_request(model.path.name, {s.name: data[s.name][:1] for s in model.signature.inputs})
    threads = options.threads or machine()["cores"]
    figures = []
    print(f"{options.clients} clients, {threads} threads; sentences a second, medians over {options.rounds} turns")
    for batch in options.batch:
        served, offline = [], []
        settings = ["--instances", 1, "--threads", threads, "--max-batch", batch]
        with Server(model.path, *map(str, settings), log=folder / "throughput.log") as server:
            for _ in range(options.rounds):
                load = Load(server.http, request).closed(options.clients, options.seconds + 1)
                if load.count(200) < len(load.answers) or load.broken:
                    raise SystemExit(f"the server refused: {[t for t in load.answers if t.status != 200][:1]}")
                timed = [t for t in load.answers if 1 < t.due_s + t.took_s <= options.seconds + 1]
                served.append(len(timed) / options.seconds)
                report = deploykit.benchmark(
                    [model.path], devices=("ort:cpu",), data=folder / "data.npz", scenario="offline", concurrency=1,
                    batch=batch, threads=threads, rounds=3, seconds=options.seconds / 3, warmup_s=0.5,
                    min_cosine=-1, progress=told,
                )  # fmt: skip
                offline.append(report.candidates[0]["throughput_per_s"])
            counted = server.metrics()
        rows = counted["deploykit_batch_rows_sum"] / counted["deploykit_batch_rows_count"]
        shares = spread(np.array(served) / np.array(offline))
        print(
            f"batch {batch}: server {np.median(served):.1f} ({rows:.2f} rows a run), offline {np.median(offline):.1f}, "
            f"share {shares['p50']:.2f} [{shares['p10']:.2f}, {shares['p90']:.2f}]"
        )
        figures.append({"batch": batch, "served": served, "offline": offline, "share": shares, "rows": rows})
    met = {f"batch {f['batch']}: {SHARE:.0%} of offline": f["share"]["p50"] >= SHARE for f in figures}
    return {"figures": figures, "met": met}


# --- overload ---------------------------------------------------------------------------------------------------------


def overload(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Memory, refusals and the 99th percentile at twice the rate that is answered."""
    model = layers(folder / "net.onnx")
    x = np.random.default_rng(0).standard_normal((1, 1024)).astype(np.float32)
    request = infer_request("net", {"x": x})
    seconds = options.minutes * 60
    samples: list[tuple[float, int]] = []
    with Server(model, "--threads", "1", "--queue", str(options.queue), log=folder / "overload.log") as server:
        workers = server.workers()
        timed = min(10.0, seconds)
        sustained = Load(server.http, request).closed(options.clients, timed)
        rate = sustained.count(200) / timed
        times = np.cumsum(np.random.default_rng(1).exponential(1 / (2 * rate), int(2 * rate * seconds)))
        print(f"{rate:.0f} a second are answered; {len(times)} come in {seconds:.0f} s", flush=True)

        def tick(now: float) -> None:
            if not samples or now >= samples[-1][0] + 1:
                samples.append((now, server.memory()))

        load = Load(server.http, request, keep=0).open(times.tolist(), tick=tick)
        same = server.workers() == workers and server.process.poll() is None
    settled = min(60.0, seconds / 4)
    memory = np.array([nbytes for at, nbytes in samples if at >= settled])
    fifth = max(1, len(memory) // 5)
    growth = float(np.median(memory[-fifth:]) / np.median(memory[:fifth]) - 1)
    rise = float(memory.max() / memory[0] - 1)
    accepted = [t for t in load.answers if t.status == 200]
    took = spread([t.took_s for t in accepted], 1e3)
    bound = spread(bounds(accepted, options.queue + SLOTS), 1e3)
    statuses = {status: load.count(status) for status in sorted({t.status for t in load.answers})}
    late = spread(load.late_s, 1e3)
    print(f"answers: {statuses}; broken {len(load.broken)}, not connected {load.refused}")
    for at, why in load.broken[:3]:
        print(f"broken after {at:.1f} s: {why}")
    print(f"accepted: {len(accepted) / times[-1]:.0f} a second; p50 {took['p50']:.0f} ms, p99 {took['p99']:.0f} ms")
    print(f"{options.queue + SLOTS + 1} answers took p50 {bound['p50']:.0f} ms, p99 {bound['p99']:.0f} ms")
    print(f"the client was late by {late['p50']:.1f} ms, p99 {late['p99']:.1f} ms, which is in the times above")
    first, most = np.median(memory[:fifth]) / 2**20, memory.max() / 2**20
    told = (
        f"{first:.1f} MB in the first fifth, {growth:+.1%} in the last, at most {most:.1f} MB, {rise:+.1%} of the first"
    )
    print(f"memory after {settled:.0f} s: {told}")
    met = {
        "every request is answered, or refused with 429 or 503":
            len(load.answers) == len(times) and set(statuses) <= {200, 429, 503},
        "no process died": same,
        f"memory flat within {FLAT:.0%}": max(abs(growth), rise) <= FLAT,
        "p99 within what the queue before a request takes": took["p99"] <= bound["p99"],
    }  # fmt: skip
    return {
        "rate": rate, "statuses": statuses, "took_ms": took, "bound_ms": bound, "late_ms": late, "growth": growth,
        "rise": rise, "memory": samples, "met": met,
    }  # fmt: skip


def bounds(accepted: list[Told], before: int) -> list[float]:
    """For each request, how long so many others and itself took from when it was due: the queue's bound."""
    ends = np.sort([t.due_s + t.took_s for t in accepted])
    last = np.searchsorted(ends, [t.due_s for t in accepted]) + before
    return [float(ends[n] - t.due_s) for n, t in zip(last, accepted, strict=True) if n < len(ends)]


PARTS = {"latency": latency, "throughput": throughput, "overload": overload, "faults": faults}


def main() -> int:
    """Print the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--turns", type=int, default=20, help="of latency")
    parser.add_argument("--calls", type=int, default=50, help="of latency, in a turn")
    parser.add_argument(
        "--usual-memory", action="store_true", help="of latency: clients give freed memory back, as C libraries do"
    )
    parser.add_argument("--clients", type=int, default=32, help="that keep a connection and ask without a pause")
    parser.add_argument("--rounds", type=int, default=3, help="turns of throughput")
    parser.add_argument("--seconds", type=float, default=6.0, help="of throughput, a turn and side")
    parser.add_argument("--model", type=Path, help="of throughput: the artifact, where it was made before")
    parser.add_argument("--threads", type=int, help="of throughput; all allowed cores by default")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="of throughput")
    parser.add_argument("--minutes", type=float, default=10.0, help="of overload")
    parser.add_argument("--queue", type=int, default=128, help="of overload: requests that may wait")
    parser.add_argument("--patience", type=float, default=300.0, help="of faults: seconds until it gives up")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    figures: dict[str, Any] = {}
    for part in options.parts or PARTS:
        here = machine()
        print(f"\n{part}: {here['cpu']}, {here['cores']} cores, load {here['load']}")
        with tempfile.TemporaryDirectory(prefix="server-") as scratch:
            figures[part] = {"machine": here, **PARTS[part](options, Path(scratch))}
        for goal, met in figures[part]["met"].items():
            print(f"{'met' if met else 'NOT MET':8} {goal}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0 if all(all(found["met"].values()) for found in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
