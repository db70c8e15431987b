"""Fusions: attention as several exporters write it, what is left alone, and tools that fail or give something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deploykit.errors import MissingDependencyError, OptimizationError
from deploykit.optimizers import FuseConfig, StepResult, fuse, has_attention, optimize, simplifier_process
from deploykit.optimizers.fuse_attention import fuse_attention
from deploykit.runtimes import open_session

HEADS, SIZE = 2, 4
WIDTH = HEADS * SIZE


def accept(candidate: Path) -> str | None:
    return None


def run(model: Path, folder: Path, config: FuseConfig, check: Callable[[Path], str | None] = accept) -> StepResult:
    before = model.read_bytes()
    result = optimize(model, config, folder / "out.onnx", check=check)
    assert model.read_bytes() == before
    assert result.changed == ((folder / "out.onnx").read_bytes() != before)
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []
    return result


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention(folder: Path, *, guard: bool = True, other: str = "x", mask: str = "float[b,1,t,t] mask") -> Path:
    """A block of attention as torch.export writes it, with a mask of an own input."""
    weights = {f"w{n}": normal(WIDTH, WIDTH, seed=i) / 2 for i, n in enumerate("qkv")}
    weights |= {f"b{n}": normal(WIDTH, seed=9 + i) for i, n in enumerate("qkv")}
    weights |= {"c": np.array(SIZE**-0.25, np.float32), "zero": np.array(0, np.float32)}
    weights |= {n: np.array(a, np.float32) for n, a in (("root", 2**0.5), ("one", 1), ("half", 0.5))}
    weights |= {"heads": np.int64([0, 0, HEADS, -1]), "whole": np.int64([0, 0, WIDTH])}
    body = "".join(
        f"""p{n} = MatMul({other if n != "q" else "x"}, w{n})
        l{n} = Add(p{n}, b{n})
        r{n} = Reshape(l{n}, heads)
        """
        for n in "qkv"
    )
    safe = "bad = IsNaN(weights) kept = Where(bad, zero, weights)" if guard else "kept = Identity(weights)"
    inputs = "float[b,t,8] x" + (", float[b,t,8] y" if other == "y" else "") + (f", {mask}" if mask else "")
    text = f"""<ir_version: 8, opset_import: ["" : 18]> g ({inputs}) => (float[b,t,8] z) {{
        {body}
        tq = Transpose<perm = [0, 2, 1, 3]>(rq)
        tk = Transpose<perm = [0, 2, 3, 1]>(rk)
        tv = Transpose<perm = [0, 2, 1, 3]>(rv)
        sq = Mul(tq, c)
        sk = Mul(tk, c)
        dots = MatMul(sq, sk)
        scores = {"Add(dots, mask)" if mask else "Identity(dots)"}
        weights = Softmax<axis = -1>(scores)
        {safe}
        mixed = MatMul(kept, tv)
        back = Transpose<perm = [0, 2, 1, 3]>(mixed)
        joined = Reshape(back, whole)
        e1 = Div(joined, root)
        e2 = Erf(e1)
        e3 = Add(e2, one)
        e4 = Mul(joined, e3)
        z = Mul(e4, half)
    }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items())
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def feeds(names: list[str], length: int = 5) -> dict[str, Any]:
    """Three samples: nothing hidden, the end hidden, all hidden."""
    made = {"x": normal(3, length, WIDTH, seed=1), "y": normal(3, length, WIDTH, seed=2)}
    mask = np.zeros((3, 1, length, length), np.float32)
    mask[1, ..., length // 2 :] = -np.inf
    mask[2] = -np.inf
    return {n: a for n, a in (made | {"mask": mask}).items() if n in names}


def outputs(path: Path, given: dict[str, Any]) -> Any:
    with open_session(path, threads=1) as session:
        return session.run(given)["z"]


def kinds(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


# --- attention -------------------------------------------------------------------------------------------------------

JOINED = {
    "one source": ({}, "Attention"),
    "other source": ({"other": "y"}, "MultiHeadAttention"),
    "no mask": ({"mask": ""}, "Attention"),
    "no guard": ({"guard": False, "mask": ""}, "Attention"),
}


@pytest.mark.parametrize("case", JOINED)
def test_attention_is_joined_with_the_same_numbers(tmp_path: Path, case: str) -> None:
    options, op = JOINED[case]
    path = attention(tmp_path, **options)
    made, count = fuse_attention(onnx.load(path))
    assert count == 1
    assert [k for k in kinds(made) if k in (op, "Softmax", "Transpose")] == [op]
    # Rows that the mask hides are zeros by the guard; no mask, no guard.
    assert ("IsNaN" in kinds(made)) == ("mask" not in options)
    onnx.save(made, tmp_path / "joined.onnx")
    for length in (1, 5):
        given = feeds([v.name for v in made.graph.input], length)
        want = outputs(path, given)
        assert np.isfinite(want).all()
        np.testing.assert_allclose(outputs(tmp_path / "joined.onnx", given), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", ["float[t] mask", "float[b,1,1,t] mask", "float[1,1,t,t] mask", "float[b,2,t,t] mask"])
def test_masks_of_every_form_are_broadcast(tmp_path: Path, mask: str) -> None:
    path = attention(tmp_path, mask=mask)
    made, count = fuse_attention(onnx.load(path))
    assert count == 1
    assert ("Expand" in kinds(made)) == (mask in ("float[t] mask", "float[b,1,1,t] mask"))
    onnx.save(made, tmp_path / "joined.onnx")
    sizes = {"b": 3, "t": 5}
    shape = [sizes.get(d) or int(d) for d in mask[6 : mask.index("]")].split(",")]
    given = feeds(["x"]) | {"mask": normal(*shape, seed=3) * 3}
    np.testing.assert_allclose(outputs(tmp_path / "joined.onnx", given), outputs(path, given), rtol=1e-4, atol=1e-5)


def test_large_weights_on_disk_are_not_read(tmp_path: Path) -> None:
    path = attention(tmp_path)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "wk":
            onnx.external_data_helper.set_external_data(tensor, "w.bin")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    made, count = fuse_attention(model)
    assert count == 1
    assert "MultiHeadAttention" in kinds(made) and kinds(made).count("MatMul") == 3


def change(path: Path, **replaced: Any) -> onnx.ModelProto:
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in replaced:
            tensor.CopyFrom(numpy_helper.from_array(replaced[tensor.name], tensor.name))
    return model


def test_what_only_looks_like_attention_is_left_alone(tmp_path: Path) -> None:
    path = attention(tmp_path, mask="")
    assert fuse_attention(onnx.load(path))[1] == 1
    # The rows of the batch become heads of one sample.
    assert fuse_attention(change(path, heads=np.int64([1, -1, HEADS, SIZE])))[1] == 0
    assert fuse_attention(change(path, whole=np.int64([1, -1, WIDTH])))[1] == 0
    shared = onnx.load(path)
    shared.graph.output.append(onnx.helper.make_tensor_value_info("weights", 1, ["b", HEADS, "t", "t"]))
    assert fuse_attention(shared)[1] == 0
    turned = onnx.load(path)
    next(n for n in turned.graph.node if n.op_type == "Softmax").attribute[0].i = 1
    assert fuse_attention(turned)[1] == 0


def test_attention_is_recognized(tmp_path: Path) -> None:
    assert has_attention(onnx.load(attention(tmp_path)))
    text = "g (float[n,4] x) => (float[n,4] y) { a = Softmax(x) y = MatMul(a, w) }"
    head = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    assert not has_attention(head)


# --- the step --------------------------------------------------------------------------------------------------------


def test_transformers_passes(tmp_path: Path) -> None:
    path = attention(tmp_path)
    result = run(path, tmp_path, FuseConfig("transformers"))
    made = onnx.load(tmp_path / "out.onnx")
    assert result.params["fused"] == {"Attention": 1, "Gelu": 1}
    assert (result.params["tool"], result.params["blocks"]) == ("transformers:bert", 1)
    assert result.params["nodes_after"] == len(made.graph.node) < result.params["nodes_before"]
    assert {o.domain for o in made.opset_import} == {"", "com.microsoft"}
    given = feeds(["x", "mask"])
    np.testing.assert_allclose(outputs(tmp_path / "out.onnx", given), outputs(path, given), rtol=1e-4, atol=1e-5)


def test_refused_attention_leaves_the_fusions_of_the_tool(tmp_path: Path) -> None:
    path = attention(tmp_path)

    def check(candidate: Path) -> str | None:
        return "output z differs" if "Attention" in kinds(onnx.load(candidate)) else None

    result = run(path, tmp_path, FuseConfig("transformers"), check)
    assert "transformers:bert was not used after attention was joined: output z differs" in result.notes
    assert result.params["fused"] == {"Gelu": 1}
    assert "Softmax" in kinds(onnx.load(tmp_path / "out.onnx"))


@pytest.mark.parametrize("passes", ["onnxscript", "transformers"])
def test_convolutions_have_nothing_to_fuse(tmp_path: Path, passes: str) -> None:
    text = "g (float[n,1,8,8] x) => (float[n,2,4,4] y) { a = Conv(x, w) b = Relu(a) y = Conv(b, v) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    weights = {"w": normal(2, 1, 3, 3), "v": normal(2, 2, 3, 3)}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    onnx.save(model, tmp_path / "m.onnx")
    result = run(tmp_path / "m.onnx", tmp_path, FuseConfig(passes))
    assert not result.changed
    assert "it found nothing to fuse: 3 nodes, 3 before" in result.notes[0]
    assert result.notes[-1] == "nothing was fused; the graph is left as it was"
    assert result.params["tool"] == "none"


def test_rules_of_onnxscript_stay_within_the_standard(tmp_path: Path) -> None:
    text = """g (float[n,3,8,8] x) => (float[n,3,6,6] y) {
        a = Conv(x, w) b = BatchNormalization(a, s, t, m, v) c = Identity(b) d = Relu(c) y = Relu(d) }"""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    weights = {"w": normal(3, 3, 3, 3), **{n: np.abs(normal(3, seed=i)) + 1 for i, n in enumerate("stmv")}}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    onnx.save(model, tmp_path / "m.onnx")
    result = run(tmp_path / "m.onnx", tmp_path, FuseConfig("onnxscript"))
    made = onnx.load(tmp_path / "out.onnx")
    assert kinds(made) == ["Conv", "Relu"]
    assert {n.domain for n in made.graph.node} == {""}
    assert (made.ir_version, made.opset_import[0].version) == (8, 18)
    assert (result.params["nodes_before"], result.params["nodes_after"]) == (5, 2)
    with open_session(tmp_path / "m.onnx") as old, open_session(tmp_path / "out.onnx") as new:
        given = {"x": normal(2, 3, 8, 8)}
        np.testing.assert_allclose(new.run(given)["y"], old.run(given)["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [FuseConfig("all"), FuseConfig(timeout_s=0), FuseConfig(timeout_s=float("nan"))])
def test_settings_that_cannot_be(tmp_path: Path, config: FuseConfig) -> None:
    with pytest.raises(OptimizationError):
        optimize(attention(tmp_path), config, tmp_path / "out.onnx", check=accept)
    assert not (tmp_path / "out.onnx").exists()


_WORKER = """
import json, os, sys, time
import onnx
for line in sys.stdin:
    tool, source, target, limit = json.loads(line).values()
    model = onnx.load(source)
    {deed}
    onnx.save(model, target)
    print(json.dumps({{"failed": None}}), flush=True)
"""
DEEDS = {
    "crash": ("os.abort()", "it crashed with signal"),
    "other interface": ("model.graph.output[0].name = model.graph.node[-1].output[0] = 'q'; del model.graph.node[0]",
                        "it changed z to q"),
    "foreign": ("del model.graph.node[0]; model.graph.node[0].domain = 'mine'", "it brought in operators of mine"),
    "nothing": ("pass", "it found nothing to fuse"),
}  # fmt: skip


@pytest.mark.parametrize("deed", DEEDS)
def test_bad_results_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: str) -> None:
    code, why = DEEDS[deed]
    (tmp_path / "worker.py").write_text(_WORKER.format(deed=code))
    monkeypatch.setattr(simplifier_process, "_WORKER", tmp_path / "worker.py")
    result = run(attention(tmp_path), tmp_path, FuseConfig("onnxscript"))
    assert not result.changed
    assert result.notes[0].startswith(f"onnxscript was not used: {why}")


def test_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "_PACKAGES", {"onnxscript": ("no_such_package", "torch")})
    with pytest.raises(MissingDependencyError, match=r"no_such_package is needed.*\[torch\]"):
        run(attention(tmp_path), tmp_path, FuseConfig("onnxscript"))


def test_large_models_keep_their_weights_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploykit.weights.WHOLE_LIMIT_BYTES", 100)
    monkeypatch.setattr("deploykit.weights.LARGE_BYTES", 200)
    path = attention(tmp_path)
    result = run(path, tmp_path, FuseConfig("transformers"))
    assert result.params["weights_set_aside"] == 3
    assert (tmp_path / "out.onnx.data").is_file()
    assert result.params["fused"] == {"Gelu": 1, "MultiHeadAttention": 1}
    given = feeds(["x", "mask"])
    np.testing.assert_allclose(outputs(tmp_path / "out.onnx", given), outputs(path, given), rtol=1e-4, atol=1e-5)
