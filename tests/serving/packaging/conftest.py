"""Small artifacts of every kind that a serving target has to know, and a server that answers from one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.artifact import Artifact, Evidence, StepRecord, write_golden
from deploykit.modelfile import signature_of
from deploykit.runtimes import RuntimeSettings, open_session
from deploykit.staging import ArtifactWriter

FLOAT, INT, TEXT = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING


def value(name: str, kind: int, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def graph_of(kind: str) -> onnx.ModelProto:
    """A model by what is special about it."""
    weight = numpy_helper.from_array(np.linspace(-1, 1, 4 * 300).astype(np.float32).reshape(4, 300), "w")
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    rows = [value("x", FLOAT, ["batch", 4])], [value("y", FLOAT, ["batch", 300])]
    axis = numpy_helper.from_array(np.array([1], np.int64), "axis")
    nodes, weights, domain = [product], [weight], ""
    if kind == "rows":
        inputs, outputs = rows
        nodes.append(helper.make_node("ReduceSum", ["y", "axis"], ["sum"], keepdims=0))
        weights.append(axis)
        outputs.append(value("sum", FLOAT, ["batch"]))
    elif kind == "steps":  # the first axis is a sequence: what comes later depends on what was before
        nodes = [helper.make_node("CumSum", ["x", "first"], ["y"])]
        weights = [numpy_helper.from_array(np.array(0, np.int64), "first")]
        inputs, outputs = [value("x", FLOAT, ["steps", 4])], [value("y", FLOAT, ["steps", 4])]
    elif kind == "centred":  # every row is told what the largest of all rows is
        nodes = [
            helper.make_node("ReduceMax", ["x"], ["most"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "most"], ["y"]),
        ]
        weights = []
        inputs, outputs = [value("x", FLOAT, ["batch", 4])], [value("y", FLOAT, ["batch", 4])]
    elif kind == "dynamic":  # quantized while it runs, by one scale for all rows
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ]
        weights = []
        inputs, outputs = [value("x", FLOAT, ["batch", 4])], [value("y", FLOAT, ["batch", 4])]
    elif kind == "scalar":
        nodes = [helper.make_node("Mul", ["x", "factor"], ["y"])]
        inputs, outputs = [value("x", FLOAT, ["n", 4]), value("factor", FLOAT, [])], [value("y", FLOAT, ["n", 4])]
    elif kind == "fixed":
        inputs, outputs = [value("x", FLOAT, [2, 4])], [value("y", FLOAT, [2, 300])]
    elif kind == "text":
        domain = "ai.onnx.ml"
        nodes = [
            helper.make_node(
                "LabelEncoder", ["word"], ["id"], domain=domain, keys_strings=["a", "bé", ""], values_int64s=[5, 7, 9]
            )
        ]
        weights = []
        inputs, outputs = [value("word", TEXT, ["batch", "words"])], [value("id", INT, ["batch", "words"])]
    else:
        raise ValueError(kind)
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 2)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def feeds_of(kind: str, rows: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    if kind == "text":
        return {"word": rng.choice(np.array(["a", "bé", "", "zz"], dtype=object), (rows, 3))}
    feeds: dict[str, Any] = {"x": rng.standard_normal((2 if kind == "fixed" else rows, 4)).astype(np.float32)}
    if kind == "scalar":
        feeds["factor"] = np.array(rows, np.float32)
    return feeds


def build(
    folder: Path,
    kind: str = "rows",
    *,
    external: bool = False,
    ir: bool = False,
    settings: RuntimeSettings | None = None,
    sizes: tuple[int, ...] = (1, 2, 5),
    step: str = "export",
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda outputs: outputs,
) -> Artifact:
    """Write an artifact whose golden outputs are the model's own, changed by `change`."""
    model = graph_of(kind)
    with ArtifactWriter(folder) as writer:
        path = writer.dir / "model.onnx"
        if external:
            (writer.dir / "weights").mkdir()
            onnx.save(model, str(path), save_as_external_data=True, location="weights/model.data", size_threshold=1024)
        else:
            onnx.save(model, str(path))
        cases = []
        with open_session(path, "ort:cpu", threads=1) as session:
            for number, size in enumerate(sizes):
                inputs = feeds_of(kind, size, number)
                cases.append((inputs, change(session.run(inputs))))
        write_golden(writer.dir / "golden.npz", cases)
        if ir:
            import openvino

            openvino.save_model(openvino.Core().read_model(path), writer.dir / "model.xml", compress_to_fp16=False)
            path.unlink()
        if settings is not None:
            (writer.dir / "settings.json").write_text(json.dumps(settings.as_dict()), encoding="utf-8")
        record = StepRecord(step=step, params={}, tools={}, parent=None, seconds=0.1)
        return writer.commit(
            model="model.xml" if ir else "model.onnx", signature=signature_of(model), lineage=[record],
            evidence=Evidence(),
        )  # fmt: skip


@pytest.fixture
def artifact(tmp_path: Path) -> Callable[..., Artifact]:
    """`artifact("text")` writes one into `tmp_path/net`."""

    def make(kind: str = "rows", name: str = "net", **options: Any) -> Artifact:
        return build(tmp_path / name, kind, **options)

    return make


class FakeServer:
    """Answers what `answer` says, on a port of its own; remembers what it was asked."""

    def __init__(self, answer: Callable[[str, Mapping[str, str], bytes], tuple[int, dict[str, str], bytes]]) -> None:
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _reply(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {k.lower(): v for k, v in self.headers.items()}
                outer.asked.append((self.path, headers, body))
                status, more, data = answer(self.path, headers, body)
                self.send_response(status)
                for key, text in more.items():
                    self.send_header(key, text)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _reply

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    """`serve(answer)` starts a `FakeServer`."""
    started: list[FakeServer] = []

    def start(answer: Any) -> FakeServer:
        started.append(FakeServer(answer))
        return started[-1]

    yield start
    for server in started:
        server.close()
