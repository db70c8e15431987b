"""A module's inner tensors, and the search for the node of its export that is not among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from deploykit.benchmarks.bisection import bisect_source
from deploykit.exporters import ExportOptions, Source, open_source
from deploykit.exporters.capture import ModuleTensors
from deploykit.exporters.sources import export
from deploykit.runtimes import parse_device

ORT = parse_device("ort:cpu")


class Block(nn.Module):
    """Attention and a feed-forward part, as transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.qkv = nn.Linear(24, 72)
        self.out = nn.Linear(24, 24)
        self.up = nn.Linear(24, 48)
        self.down = nn.Linear(48, 24)

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(self.norm(x)).reshape(*x.shape[:2], 3, 4, 6).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.down(nn.functional.gelu(self.up(x)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def make_encoder() -> Any:
    torch.manual_seed(0)
    return Encoder().eval(), (torch.randn(2, 7, 24),)


@pytest.fixture(scope="module", params=["torch.export", "torchscript"])
def exported(request: Any, tmp_path_factory: Any) -> tuple[Source, Path]:
    folder = tmp_path_factory.mktemp("encoder")
    source = open_source(f"{__file__}:make_encoder", ExportOptions(way=request.param), lambda path: pytest.fail("ONNX"))
    export(source, source.ways[0], folder / "m.onnx", opset=18 if request.param == "torch.export" else 14)
    return source, folder / "m.onnx"


def search(source: Source, file: Path) -> Any:
    case = source.cases[0]
    found = bisect_source(file, ORT, source.tensors(case.feeds), case.outputs, case.feeds)
    return found


def test_every_operator_is_recorded_with_its_place(exported: tuple[Source, Path]) -> None:
    source, _ = exported
    case = source.cases[0]
    tensors = source.tensors(case.feeds)
    names = list(tensors.sizes)
    assert any(":blocks.1.qkv:" in n for n in names) and any(n.endswith(":gelu") for n in names)
    last = names[-1]
    assert np.allclose(tensors.fetch([last])[last], case.outputs["output"], atol=1e-6)
    assert tensors.sizes[last] == case.outputs["output"].nbytes
    assert tensors.describe(last).endswith(" of head")
    some = names[:: len(names) // 5]
    assert list(tensors.fetch(some)) == some


def test_hooks_and_modes_are_gone_afterwards(exported: tuple[Source, Path]) -> None:
    module, (x,) = make_encoder()
    tensors = ModuleTensors(module, {"x": x.numpy()})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert len(ModuleTensors(module, {"x": x.numpy()}).sizes) == len(tensors.sizes)


def plant(model: onnx.ModelProto, fault: str) -> str:
    """Make a node wrong; returns its name."""
    nodes = list(model.graph.node)
    if fault == "erf":
        found = [n for n in nodes if n.op_type in ("Erf", "Gelu")][1]
        found.op_type = "Tanh"
        del found.attribute[:]
    elif fault == "softmax":
        found = [n for n in nodes if n.op_type == "Softmax"][1]
        found.attribute[0].i = -2
    else:
        weights = {t.name: t for t in model.graph.initializer}
        found = [n for n in nodes if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights][5]
        tensor = weights[found.input[1]]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.2), tensor.name))
    return str(found.name)


@pytest.mark.parametrize("fault", ["erf", "softmax", "weight"])
def test_planted_fault_of_an_export(exported: tuple[Source, Path], tmp_path: Path, fault: str) -> None:
    source, file = exported
    model = onnx.load(str(file))
    planted = plant(model, fault)
    onnx.save(model, str(tmp_path / "wrong.onnx"))
    found = search(source, tmp_path / "wrong.onnx")
    assert found.node == planted, found.summary
    assert any("the source goes on with" in c for c in found.causes)
    assert any("blocks." in c for c in found.causes)


def test_right_export_gives_nothing_to_find(exported: tuple[Source, Path]) -> None:
    found = search(*exported)
    assert found.kind == "unknown"


class Picks(nn.Module):
    """The three largest, of scores that tie."""

    def forward(self, x: Any) -> Any:
        scores = torch.round(x * 2)
        values, places = torch.topk(scores, 3, dim=-1)
        return values, places, scores.argmax(-1)


def make_picks() -> Any:
    torch.manual_seed(0)
    return Picks(), (torch.randn(6, 30),)


def test_choices_are_recorded(tmp_path: Path) -> None:
    source = open_source(f"{__file__}:make_picks", ExportOptions(), lambda path: pytest.fail("ONNX"))
    case = source.cases[0]
    choices = source.tensors(case.feeds).choices(case.feeds)
    assert [c.op for c in choices] == ["TopK", "ArgMax"]
    assert choices[0].inputs[0].shape == (6, 30)
    assert [o.dtype.kind for o in choices[0].outputs] == ["f", "i"]
    assert len(choices[1].outputs) == 1


def test_ties_between_torch_and_the_runtimes(tmp_path: Path) -> None:
    """torch, ONNX Runtime and OpenVINO choose differently among equal scores, and all are right."""
    import deploykit

    source = open_source(f"{__file__}:make_picks", ExportOptions(), lambda path: pytest.fail("ONNX"))
    export(source, source.ways[0], tmp_path / "m.onnx", opset=18)
    records = deploykit.verify(tmp_path / "m.onnx", against=f"{__file__}:make_picks", dims={"batch": 9})
    assert [r["verdict"] for r in records] == ["passed", "passed"], records
    said = [text for r in records for text in r.get("relaxed", ())]
    assert said and all("(TopK): ties in" in text or "(ArgMax): ties in" in text for text in said)
