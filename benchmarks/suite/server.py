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
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from server_clients import Echo, Load, RawHttp, Server, Told, infer_request, machine, spread

import deploykit
from deploykit.artifact import Artifact
from deploykit.progress import TerminalProgress
from deploykit.runtimes import open_session
from deploykit.serving.memory import keep_freed_memory

PARTS = ("latency", "throughput", "overload", "faults")
LATENCY_MS, SHARE, FLAT = 1.0, 0.9, 0.05
EVENTS = ("new version", "SIGHUP", "kill -9 of a worker", "SIGTERM")
# Requests that a process is given beside those in the queue: one runs, and one lies ready.
SLOTS = 2
SHAPE = (1, 3, 224, 224)


def save(path: Path, nodes: list[Any], inputs: Any, outputs: Any, constants: Any = ()) -> Path:
    """A model file."""
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def relu(path: Path) -> Path:
    """x [1, 3, 224, 224] -> y, the next thing to identity that a runtime still computes."""
    value = (TensorProto.FLOAT, SHAPE)
    return save(path, [helper.make_node("Relu", ["x"], ["y"])], [("x", *value)], [("y", *value)])


def layers(path: Path, depth: int = 20, width: int = 1024) -> Path:
    """x [batch, width] -> y, some milliseconds of products."""
    draw = np.random.default_rng(0)
    weights = [draw.standard_normal((width, width)).astype(np.float32) / 32 for _ in range(2)]
    names = ["x", *(f"t{i}" for i in range(depth - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i % 2}"], [names[i + 1]]) for i in range(depth)]
    value = (TensorProto.FLOAT, ["batch", width])
    return save(path, nodes, [("x", *value)], [("y", *value)], [(f"w{i}", w) for i, w in enumerate(weights)])


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


def ready_grpc(port: int, x: np.ndarray) -> Callable[[], bytes]:
    """A call of gRPC with a message that is made once and an answer that stays bytes."""
    import grpc
    from tritonclient.grpc import service_pb2

    asked = service_pb2.ModelInferRequest(model_name="net", raw_input_contents=[x.tobytes()])
    asked.inputs.add(name="x", datatype="FP32", shape=x.shape)
    message = asked.SerializeToString()
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=unlimited)
    method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    def ask() -> bytes:
        found: bytes = method(message)
        return found

    return ask


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
    growth = float(memory.max() / memory[0] - 1)
    accepted = [t for t in load.answers if t.status == 200]
    took = spread([t.took_s for t in accepted], 1e3)
    bound = spread(bounds(accepted, options.queue + SLOTS), 1e3)
    statuses = {status: load.count(status) for status in sorted({t.status for t in load.answers})}
    late = spread(load.late_s, 1e3)
    print(f"answers: {statuses}; broken {len(load.broken)}, not connected {load.refused}")
    print(f"accepted: {len(accepted) / times[-1]:.0f} a second; p50 {took['p50']:.0f} ms, p99 {took['p99']:.0f} ms")
    print(f"{options.queue + SLOTS + 1} answers took p50 {bound['p50']:.0f} ms, p99 {bound['p99']:.0f} ms")
    print(f"the client was late by {late['p50']:.1f} ms, p99 {late['p99']:.1f} ms, which is in the times above")
    first, most, last = (nbytes / 2**20 for nbytes in (memory[0], memory.max(), memory[-1]))
    print(f"memory: {first:.1f} MB after {settled:.0f} s, at most {most:.1f} MB after that, {last:.1f} MB at the end")
    met = {
        "every request is answered, or refused with 429 or 503":
            len(load.answers) == len(times) and set(statuses) <= {200, 429, 503},
        "no process died": same,
        f"memory flat within {FLAT:.0%}": growth <= FLAT,
        "p99 within what the queue before a request takes": took["p99"] <= bound["p99"],
    }  # fmt: skip
    return {
        "rate": rate, "statuses": statuses, "took_ms": took, "bound_ms": bound, "late_ms": late, "growth": growth,
        "memory": samples, "met": met,
    }  # fmt: skip


def bounds(accepted: list[Told], before: int) -> list[float]:
    """For each request, how long so many others and itself took from when it was due: the queue's bound."""
    ends = np.sort([t.due_s + t.took_s for t in accepted])
    last = np.searchsorted(ends, [t.due_s for t in accepted]) + before
    return [float(ends[n] - t.due_s) for n, t in zip(last, accepted, strict=True) if n < len(ends)]


# --- faults -----------------------------------------------------------------------------------------------------------


def faults(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What is lost by a new version, SIGHUP, kill -9 of a worker, and SIGTERM, while clients ask."""
    deploykit.export(layers(folder / "layers.onnx", depth=4), folder / "made")
    shutil.copytree(folder / "made", folder / "net" / "1")
    x = np.random.default_rng(0).standard_normal((1, 1024)).astype(np.float32)
    request = infer_request("net", {"x": x})
    marks: dict[str, float] = {}
    with Server(folder / "net", "--threads", "1", "--instances", "2", log=folder / "faults.log") as server:
        over_grpc = [GrpcClient(server.grpc, x) for _ in range(2)]
        load = Load(server.http, request)

        def events() -> Iterator[None]:
            yield from idle(load, 50)
            marks["new version"] = time.perf_counter()
            shutil.copytree(folder / "made", folder / "copy")
            (folder / "copy").rename(folder / "net" / "2")
            while b'"model_version":"2"' not in load.answers[-1].body:
                yield
            yield from idle(load, 50)
            marks["SIGHUP"] = time.perf_counter()
            deploykit.export(layers(folder / "other.onnx", depth=3), folder / "next")
            before = server.workers()
            (folder / "net" / "2").rename(folder / "old")
            (folder / "next").rename(folder / "net" / "2")
            server.process.send_signal(signal.SIGHUP)
            while len(now := server.workers()) != 2 or set(now) & set(before):
                yield
            yield from idle(load, 50)
            marks["kill -9 of a worker"] = time.perf_counter()
            victim = now[0]
            os.kill(victim, signal.SIGKILL)
            while len(now := server.workers()) != 2 or victim in now or server.metrics()["deploykit_workers"] != 2:
                yield
            yield from idle(load, 50)
            marks["SIGTERM"] = time.perf_counter()
            server.process.send_signal(signal.SIGTERM)
            while True:
                yield

        steps = events()
        started = time.perf_counter()
        load.closed(options.clients, options.patience, tick=lambda now: next(steps))
        ended = server.process.wait(options.patience)
        for client in over_grpc:
            client.end()
    return judge(load, over_grpc, {name: at - started for name, at in marks.items()}, started, ended)


def idle(load: Load, count: int) -> Iterator[None]:
    """Wait for some answers."""
    wanted = len(load.answers) + count
    while len(load.answers) < wanted:
        yield


class GrpcClient:
    """Asks without a pause over gRPC, in a thread, until the server is gone; `codes` holds when and what it was told.

    Args:
        port: Of the server.
        x: What it sends.
    """

    def __init__(self, port: int, x: np.ndarray) -> None:
        self.codes: list[tuple[float, str, str]] = []
        self._ask = ready_grpc(port, x)
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        import grpc

        while not self._ended:
            try:
                self._ask()
                self.codes.append((time.perf_counter(), "OK", ""))
            except grpc.RpcError as exc:
                self.codes.append((time.perf_counter(), exc.code().name, exc.details()))
                time.sleep(0.01)

    def end(self) -> None:
        """Ask no more."""
        self._ended = True
        self._thread.join()


def judge(
    load: Load, over_grpc: list[GrpcClient], marks: dict[str, float], started: float, code: int
) -> dict[str, Any]:
    """Print what was told after each event, and say whether anything is lost."""
    names = ["", *marks]
    begins = np.array([0.0, *marks.values()])

    def phase(at: float) -> str:
        return names[int(np.searchsorted(begins, at, "right")) - 1]

    found: dict[str, dict[str, int]] = {name: {} for name in names}

    def count(at: float, what: str) -> None:
        here = found[phase(at)]
        here[what] = here.get(what, 0) + 1

    for told in load.answers:
        clean = told.status == 503 and b"died" in told.body
        count(told.due_s + told.took_s, "HTTP 503, its worker died" if clean else f"HTTP {told.status}")
    for at, _ in load.broken:
        count(at, "HTTP LOST")
    for client in over_grpc:
        for at, status, text in client.codes:
            count(at - started, f"gRPC {_told(status, text)}")
    for name, counts in found.items():
        print(f"{name or 'before':20} {', '.join(f'{what}: {n}' for what, n in sorted(counts.items()))}")
    print(f"exit code {code}; {load.refused} HTTP clients were not let in any more")
    harmless = {"HTTP 200", "gRPC OK"}
    allowed = {
        "kill -9 of a worker": harmless | {"HTTP 503, its worker died", "gRPC UNAVAILABLE, its worker died"},
        "SIGTERM": harmless | {"gRPC UNAVAILABLE, not accepted"},
    }
    met = {f"{name}: nothing accepted is lost": set(found[name]) <= allowed.get(name, harmless) for name in names[1:]}
    died = sum(n for what, n in found["kill -9 of a worker"].items() if "its worker died" in what)
    met[f"only those in flight on the killed worker, {SLOTS} at most, are told that it died"] = died <= SLOTS
    met["all events came, and the server ended with 0"] = len(marks) == len(EVENTS) and code == 0
    return {"found": found, "code": code, "met": met}


def _told(status: str, text: str) -> str:
    if status == "UNAVAILABLE" and "died" in text:
        return "UNAVAILABLE, its worker died"
    if status == "UNAVAILABLE" and any(word in text for word in ("GOAWAY", "refused", "is ending", "being stopped")):
        return "UNAVAILABLE, not accepted"
    return status if status == "OK" else f"{status}, LOST: {text[:200]}"


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
            figures[part] = {"machine": here, **globals()[part](options, Path(scratch))}
        for goal, met in figures[part]["met"].items():
            print(f"{'met' if met else 'NOT MET':8} {goal}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0 if all(all(found["met"].values()) for found in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
