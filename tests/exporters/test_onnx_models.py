"""ONNX files as they are found in the wild: exported with the right signature, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.errors import DataError, DeploykitError, ExportError, InferenceError, ModelError
from deploykit.exporting import export
from deploykit.inspecting import inspect_model
from deploykit.pipeline import simplify, verify

HEAD = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1, "local" : 1]>'
RNG = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def parse(text: str, head: str = HEAD, **weights: Any) -> onnx.ModelProto:
    model = onnx.parser.parse_model(head + text)
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return model


def save(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def old(opset: int, ir_version: int) -> onnx.ModelProto:
    model = parse(
        "g (float[n,3,8,8] x) => (float[n,4] y) { a = Conv<kernel_shape=[3,3]>(x, w, c) b = Relu(a) "
        "p = GlobalAveragePool(b) f = Flatten(p) y = Gemm(f, v, g) }",
        f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>',
        w=normal(4, 3, 3, 3), c=normal(4), v=normal(4, 4), g=normal(4),
    )  # fmt: skip
    if ir_version < 4:
        for tensor in model.graph.initializer:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


def sparse() -> onnx.ModelProto:
    model = parse("g (float[n,4] x) => (float[n,4] y) { y = MatMul(x, w) }")
    values = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [3], [0, 5, 10])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 4]))
    return model


def overridable() -> onnx.ModelProto:
    model = parse("g (float[n,4] x) => (float[n,4] y) { y = MatMul(x, w) }", w=normal(4, 4))
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))
    return model


def wrong_inside() -> onnx.ModelProto:
    model = parse("g (float[n,4] x) => (float[n,4] y) { z = Relu(x) y = MatMul(z, w) }", w=normal(4, 4))
    model.graph.value_info.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [7, 9]))
    return model


def no_output_shape() -> onnx.ModelProto:
    model = parse("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def negative_dimension() -> onnx.ModelProto:
    model = parse("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    return model


ROWS = "g (float[n,4] x) => (float[n,4] y)"
INT8 = RNG.integers(-127, 127, (4, 4)).astype(np.int8)
BODY = "b (int64 i, bool go, float[n,4] s) => (bool on, float[n,4] t) { on = Identity(go) t = MatMul(s, w) }"
ACCEPTED: dict[str, Any] = {
    "If": lambda: parse(
        "g (float[n,4] x, bool c) => (float[n,4] y) { y = If (c) <then_branch = t () => (float[n,4] a) "
        "{ a = MatMul(x, w) }, else_branch = e () => (float[n,4] b) { b = Neg(x) }> }",
        w=normal(4, 4),
    ),
    "Loop": lambda: parse(
        f"{ROWS} {{ y = Loop(k, go, x) <body = {BODY}> }}", w=normal(4, 4), k=np.int64(3), go=np.array(True)
    ),
    "Scan": lambda: parse(
        "g (float[n,4] x) => (float[4] s, float[n,4] y) { s, y = Scan<num_scan_inputs=1, body = b (float[4] a, "
        "float[4] i) => (float[4] o, float[4] r) { o = Add(a, i) r = Mul(o, i) }>(z, x) }",
        z=np.zeros(4, np.float32),
    ),
    "function": lambda: parse(
        f'{ROWS} {{ y = local.lin(x, w) }} <domain: "local", opset_import: ["" : 17]> '
        "lin (a, b) => (c) { m = MatMul(a, b) c = Relu(m) }",
        w=normal(4, 4),
    ),
    "contrib": lambda: parse(
        f"{ROWS} {{ h = MatMul(x, w) y = com.microsoft.FastGelu(h, b) }}", w=normal(4, 4), b=normal(4)
    ),
    "QDQ": lambda: parse(
        f"{ROWS} {{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s) "
        "y = MatMul(d, v) }",
        s=np.float32(0.05),
        z=np.uint8(128),
        w=INT8,
    ),
    "MatMulInteger": lambda: parse(
        f"{ROWS} {{ q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z) f = Cast<to=1>(i) y = Mul(f, s) }}",
        w=INT8,
    ),
    "MatMulNBits": lambda: parse(
        "g (float[n,32] x) => (float[n,8] y) { y = com.microsoft.MatMulNBits<K=32,N=8,bits=4,block_size=32>(x, w, s) }",
        w=RNG.integers(0, 255, (8, 1, 16)).astype(np.uint8),
        s=np.abs(normal(8)),
    ),
    "int4": lambda: parse(
        "g (float[n,8] x) => (float[n,4] y) { d = DequantizeLinear(w, s) y = MatMul(x, d) }",
        '<ir_version: 10, opset_import: ["" : 21]>',
        w=RNG.integers(-8, 7, (8, 4)).astype(ml_dtypes.int4),
        s=np.float32(0.1),
    ),
    "float8": lambda: parse(
        "g (float[n,8] x) => (float[n,4] y) { d = DequantizeLinear(w, s) y = MatMul(x, d) }",
        '<ir_version: 10, opset_import: ["" : 21]>',
        w=normal(8, 4).astype(ml_dtypes.float8_e4m3fn),
        s=np.float32(0.1),
    ),
    "float16": lambda: parse(
        "g (float16[n,8] x) => (float16[n,4] y) { y = MatMul(x, w) }", w=normal(8, 4).astype(np.float16)
    ),
    "bfloat16": lambda: parse(
        "g (float[n,8] x) => (float[n,4] y) { h = Cast<to=1>(w) y = MatMul(x, h) }",
        w=normal(8, 4).astype(ml_dtypes.bfloat16),
    ),
    "strings out": lambda: parse("g (float[n] x) => (string[n] y) { y = Cast<to=8>(x) }"),
    "opset 7": lambda: old(7, 3),
    "opset 8": lambda: old(8, 3),
    "opset 9": lambda: old(9, 4),
    "overridable": overridable,
    "empty optional": lambda: parse(
        'g (float[n,1,4,4] x) => (float[n,1,8,8] y) { c = Clip(x, , hi) y = Resize<mode="nearest">(c, , sc) }',
        hi=np.float32(1),
        sc=np.float32([1, 1, 2, 2]),
    ),
    "scalar": lambda: parse("g (float x, float[n] v) => (float[n] y) { y = Mul(v, x) }"),
    "empty tensor": lambda: parse(f"{ROWS} {{ y = Concat<axis=0>(x, e) }}", e=np.zeros((0, 4), np.float32)),
    "unused input": lambda: parse("g (float[n,4] x, float[n,2] u) => (float[n,4] y) { y = Relu(x) }"),
    "output is input": lambda: parse("g (float[n,4] x) => (float[n,4] x, float[n,4] y) { y = Relu(x) }"),
    "output is weight": lambda: parse(
        "g (float[n,4] x) => (float[n,4] y, float[4,4] w) { y = MatMul(x, w) }", w=normal(4, 4)
    ),
    "random, unused": lambda: parse(
        f"{ROWS} {{ r = RandomNormalLike(x) q = Mul(r, z) y = Add(x, q) }}", z=np.float32(0)
    ),
    "dropout, off": lambda: parse(f"{ROWS} {{ y = Dropout(x, r, t) }}", r=np.float32(0.5), t=np.array(False)),
    "batch of 1 only": lambda: parse("g (float[n,4] x) => (float[1,4] y) { y = Reshape(x, s) }", s=np.int64([1, 4])),
    "data-dependent": lambda: parse("g (float[n,4] x) => (int64[2,k] y) { b = Relu(x) y = NonZero(b) }"),
    "sparse": sparse,
    "wrong inside": wrong_inside,
    "output without rank": no_output_shape,
    "negative dimension": negative_dimension,
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_accepted(tmp_path: Path, kind: str) -> None:
    path = save(ACCEPTED[kind](), tmp_path)
    assert inspect_model(path, load=False)["nodes"]
    made = export(path, tmp_path / "out", devices=["ort:cpu"])
    assert made.model_path.read_bytes() == path.read_bytes()
    assert verify(made.path, devices=["ort:cpu"])[0]["verdict"] == "passed"


def unranked() -> onnx.ModelProto:
    model = parse(f"{ROWS} {{ y = Relu(x) }}")
    model.graph.input[0].type.tensor_type.ClearField("shape")
    return model


def unsorted() -> onnx.ModelProto:
    model = parse(f"{ROWS} {{ z = Relu(x) y = Neg(z) }}")
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def twins() -> onnx.ModelProto:
    model = parse(f"{ROWS} {{ z = Relu(x) y = Neg(z) }}")
    for node in model.graph.node:
        node.name = "same"
    return model


def versions(**changes: int) -> onnx.ModelProto:
    model = parse(f"{ROWS} {{ y = Relu(x) }}")
    model.ir_version = changes.get("ir_version", 8)
    model.opset_import[0].version = changes.get("opset", 17)
    return model


SEQUENCE = "g (float[n,4] x) => (seq(float[n,4]) y)"
OPTIONAL = "g (optional(float[4]) x) => (bool y)"
NOISE = '<domain: "local", opset_import: ["" : 17]> noise (a) => (c) { m = RandomNormalLike(a) c = Add(a, m) }'
REFUSED: dict[str, tuple[Any, type[DeploykitError], str]] = {
    "sequence": (lambda: parse(f"{SEQUENCE} {{ y = SequenceConstruct(x, x) }}"), ModelError, "of kind sequence"),
    "optional": (lambda: parse(f"{OPTIONAL} {{ y = OptionalHasElement(x) }}"), ModelError, "of kind optional"),
    "unranked": (unranked, DataError, "--data"),
    "strings": (lambda: parse("g (string[n] x) => (string[n] y) { y = Identity(x) }"), DataError, "--data"),
    "unsorted": (unsorted, ModelError, "topologically sorted"),
    "twin names": (twins, InferenceError, "two nodes with same node name"),
    "unknown domain": (lambda: parse(f"{ROWS} {{ y = local.Foo(x) }}"), InferenceError, "local:Foo"),
    "wrong type": (lambda: parse("g (float[n,4] x) => (int64[n,4] y) { y = Relu(x) }"), InferenceError, "Type Error"),
    "random": (lambda: parse(f"{ROWS} {{ r = RandomNormalLike(x) y = Add(x, r) }}"), ExportError, "RandomNormalLike"),
    "seeded": (
        lambda: parse(f"{ROWS} {{ r = RandomNormalLike<seed=1.0>(x) y = Add(x, r) }}"),
        ExportError,
        "each time",
    ),
    "random in a function": (
        lambda: parse(f"{ROWS} {{ y = local.noise(x) }} {NOISE}"),
        ExportError,
        "RandomNormalLike",
    ),
    "dropout": (
        lambda: parse(f"{ROWS} {{ y = Dropout(x, r, t) }}", r=np.float32(0.5), t=np.array(True)),
        ExportError,
        "Dropout",
    ),
    "opset of the future": (lambda: versions(opset=99), InferenceError, "opset"),
    "IR of the future": (lambda: versions(ir_version=99), ModelError, "ir_version"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path: Path, message: Any, kind: str) -> None:
    make, error, words = REFUSED[kind]
    path = save(make(), tmp_path)
    assert words in message(error, lambda: export(path, tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("kind", ["random", "seeded", "dropout"])
def test_random_models_are_not_simplified(tmp_path: Path, message: Any, kind: str) -> None:
    path = save(REFUSED[kind][0](), tmp_path)
    assert "each time" in message(ModelError, lambda: simplify(path, tmp_path / "out"))


def test_unknown_rank_with_data(tmp_path: Path) -> None:
    path = save(unranked(), tmp_path)
    np.savez(tmp_path / "data.npz", x=normal(9, 4))
    made = export(path, tmp_path / "out", data=tmp_path / "data.npz", devices=["ort:cpu"])
    assert verify(made.path, devices=["ort:cpu"])[0]["verdict"] == "passed"


@pytest.mark.parametrize(("declared", "wrong"), [("[1,4]", True), ("[n,5]", True), ("[m,4]", False), ("[n,4]", False)])
def test_wrong_declarations_do_not_reach_the_manifest(tmp_path: Path, declared: str, wrong: bool) -> None:
    path = save(
        parse(f"g (float[n,4] x) => (float{declared} y) {{ z = Relu(x) y = MatMul(z, w) }}", w=normal(4, 4)), tmp_path
    )
    made = export(path, tmp_path / "out", devices=["ort:cpu"])
    assert made.signature.outputs[0].shape == (("m", 4) if declared == "[m,4]" else ("n", 4))
    assert any("the file declares" in note for note in made.manifest.lineage[-1].notes) == wrong


def test_quantized_sources_are_known_as_such(tmp_path: Path) -> None:
    """Runtimes round them in their own ways, so that they are held to a cosine, and the manifest says so."""
    made = export(save(ACCEPTED["QDQ"](), tmp_path), tmp_path / "out", devices=["ort:cpu"])
    assert made.manifest.lineage[-1].params["quantized"] is True
    assert made.manifest.evidence.parity[0]["tolerance"] is None
    plain = export(save(ACCEPTED["opset 9"](), tmp_path), tmp_path / "plain", devices=["ort:cpu"])
    assert "quantized" not in plain.manifest.lineage[-1].params
    assert plain.manifest.evidence.parity[0]["tolerance"] is not None


def test_external_data_with_offsets(tmp_path: Path) -> None:
    model = parse(f"{ROWS} {{ h = MatMul(x, a) y = MatMul(h, b) }}", a=normal(4, 4), b=normal(4, 4))
    data = bytearray(b"\xff" * 1000)
    for tensor, offset in zip(model.graph.initializer, (700, 128), strict=True):
        data[offset : offset + 64] = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "w.bin"), ("offset", offset), ("length", 64)):
            tensor.external_data.add(key=key, value=str(value))
    (tmp_path / "w.bin").write_bytes(data)
    made = export(save(model, tmp_path), tmp_path / "out", devices=["ort:cpu"])
    assert (made.path / "w.bin").read_bytes() == data
    assert verify(made.path, devices=["ort:cpu"])[0]["verdict"] == "passed"
