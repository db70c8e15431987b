"""What every kind of source has to do: become an ONNX file that gives its numbers, in both runtimes."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploykit.benchmarks.parity import Verdict, check_vacuity, compare
from deploykit.errors import DeploykitError
from deploykit.exporters import Source, Way, export
from deploykit.modelfile import external_files, read_model, signature_of
from deploykit.runtimes import open_session

DEVICES = ("ort:cpu", "openvino:cpu")
BATCH, SEQUENCE = ("batch",), ("batch", "sequence")


@dataclass(frozen=True)
class Kind:
    """One kind of source, and what its signature has to be.

    Attributes:
        make: Makes the source in a folder; gives its name and options.
        inputs: Names.
        outputs: Names.
        symbols: Names of the dynamic dimensions of the inputs.
        way: The first way.
        devices: Where it runs.
    """

    make: Callable[[Any, Path, Path], tuple[str, dict[str, Any]]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    symbols: tuple[str, ...] = BATCH
    way: str = "torch.export"
    devices: tuple[str, ...] = DEVICES


def _package(build: Any, folder: Path) -> str:
    package = folder / "contract_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(build.zoo.read_text())
    return "contract_package.models:classifier"


def _copy_zoo(build: Any, folder: Path) -> Path:
    file: Path = folder / "zoo_of_contract.py"
    file.write_text(build.zoo.read_text())
    return file


def _onnx(build: Any, folder: Path) -> str:
    onnx.save(build.text_model(), folder / "text.onnx")
    return str(folder / "text.onnx")


def _shallow(minilm: Path, folder: Path) -> str:
    """The first layer of a real model, with its tokenizer; tests/pipeline/test_minilm.py exports the whole."""
    import transformers

    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(minilm, folder, ignore=weights)
    transformers.AutoModel.from_pretrained(minilm, num_hidden_layers=1).save_pretrained(folder)
    return str(folder)


STATE = ("x:0=batch,1=steps", "state_0:1=batch", "state_1:1=batch")


def _skops(build: Any, folder: Path) -> str:
    import skops.io

    skops.io.dump(build.trained.forest()[0], folder / "forest.skops")
    return str(folder / "forest.skops")


def _tflite(build: Any, folder: Path) -> str:
    saved = build.trained.saved_model(folder / "saved")
    return str(build.trained.tflite(folder / "model.tflite", saved))


PIXELS = ("pixel_values",)
TEXT = ("input_ids", "attention_mask", "token_type_ids")
KINDS = {
    "file": Kind(lambda b, d, _: (f"{_copy_zoo(b, d)}:classifier", {}), ("image",), ("output",)),
    "file-example-of-one": Kind(lambda b, d, _: (f"{_copy_zoo(b, d)}:classifier_of_one", {}), ("image",), ("output",)),
    "torchscript": Kind(
        lambda b, d, _: (f"{_copy_zoo(b, d)}:classifier", {"way": "torchscript"}),
        ("image",),
        ("output",),
        way="torchscript",
    ),
    "package": Kind(lambda b, d, _: (_package(b, d), {}), ("image",), ("output",)),
    "inputs-described": Kind(
        lambda b, d, _: (
            f"{_copy_zoo(b, d)}:tokens_alone",
            {"inputs": ("ids=int64[batch,sequence]:0..49",), "dims": {"sequence": 7}},
        ),
        ("ids",),
        ("output",),
        SEQUENCE,
    ),
    "several": Kind(
        lambda b, d, _: (f"{_copy_zoo(b, d)}:pair", {}),
        ("linear", "add"),
        ("linear_out", "add_out", "mul_a_b", "mul_a_b_2"),
    ),
    "several-torchscript": Kind(
        lambda b, d, _: (f"{_copy_zoo(b, d)}:pair", {"way": "torchscript"}),
        ("linear", "add"),
        ("linear_out", "add_out", "mul_a_b", "mul_a_b_2"),
        way="torchscript",
    ),
    "nested": Kind(
        lambda b, d, _: (f"{_copy_zoo(b, d)}:takes_nest", {}),
        ("batch_image", "batch_mask", "features_0", "features_1", "scale_by_0"),
        ("image", "mask"),
    ),
    "recurrent": Kind(
        lambda b, d, _: (f"{_copy_zoo(b, d)}:lstm_with_state", {"dynamic": STATE}),
        ("x", "state_0", "state_1"),
        ("y", "state_0_out", "state_1_out"),
        ("batch", "steps"),
        way="torchscript",
    ),
    "height-and-width": Kind(
        lambda b, d, _: (
            f"{_copy_zoo(b, d)}:fully_convolutional",
            {"dynamic": ("image:0=batch,2=height,3=width",)},
        ),
        ("image",),
        ("output",),
        ("batch", "height", "width"),
    ),
    "pt2": Kind(lambda b, d, _: (str(b.pt2(d / "program.pt2")), {}), ("x", "bias"), ("output",)),
    "huggingface-minilm": Kind(
        lambda b, d, minilm: (_shallow(minilm, d / "minilm"), {}),
        TEXT,
        ("last_hidden_state", "pooler_output"),
        SEQUENCE,
    ),
    "huggingface-text": Kind(lambda b, d, _: (str(b.text(d / "text", num_labels=4)), {}), TEXT, ("logits",), SEQUENCE),
    "huggingface-vit": Kind(lambda b, d, _: (str(b.image(d / "vit", "vit")), {}), PIXELS, ("logits",)),
    "huggingface-resnet": Kind(lambda b, d, _: (str(b.image(d / "resnet", "resnet")), {}), PIXELS, ("logits",)),
    "onnx": Kind(lambda b, d, _: (_onnx(b, d), {}), ("ids",), ("scores",), SEQUENCE, "copy"),
    "onnx-external": Kind(
        lambda b, d, _: (str(b.external(d / "external")), {}), ("ids",), ("scores",), SEQUENCE, "copy"
    ),
    "keras": Kind(
        lambda b, d, _: (str(b.trained.keras_file(d / "net.keras")), {}), ("image",), ("output",), way="tf2onnx"
    ),
    "keras-factory": Kind(
        lambda b, d, _: (f"{b.trained.__file__}:keras_factory", {}), ("image",), ("output",), way="tf2onnx"
    ),
    "savedmodel": Kind(
        lambda b, d, _: (str(b.trained.saved_model(d / "saved")), {}), ("image",), ("output_0",), way="tf2onnx"
    ),
    "tflite": Kind(lambda b, d, _: (_tflite(b, d), {}), ("image",), ("output_0",), way="tf2onnx"),
    # OpenVINO has no operators of the domain ai.onnx.ml, and no strings.
    "sklearn": Kind(
        lambda b, d, _: (f"{b.trained.__file__}:forest", {}),
        ("X",),
        ("label", "probabilities"),
        way="skl2onnx",
        devices=DEVICES[:1],
    ),
    "skops": Kind(
        lambda b, d, _: (_skops(b, d), {}), ("X",), ("label", "probabilities"), way="skl2onnx", devices=DEVICES[:1]
    ),
    "sklearn-table": Kind(
        lambda b, d, _: (f"{b.trained.__file__}:table", {}),
        ("alcohol", "malic_acid", "magnesium", "tint"),
        ("label", "probabilities"),
        way="skl2onnx",
        devices=DEVICES[:1],
    ),
    "sklearn-text": Kind(
        lambda b, d, _: (f"{b.trained.__file__}:text", {}),
        ("text",),
        ("label", "probabilities"),
        way="skl2onnx",
        devices=DEVICES[:1],
    ),
}


@dataclass(frozen=True)
class Made:
    """An exported source."""

    kind: Kind
    source: Source
    way: Way
    path: Path
    folder: Path
    before: dict[str, str]
    root: Path


def _digests(root: Path) -> dict[str, str]:
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.fixture(scope="module", params=KINDS)
def made(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    minilm_dir: Path,
    build: Any,
    opened: Any,
) -> Iterator[Made]:
    kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp("source")
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        name, options = kind.make(build, folder, minilm_dir)
        root = Path(name) if Path(name).is_dir() else folder
        before = _digests(root)
        source = opened(name, **options)
        way = source.ways[0]
        export(source, way, path, opset=None)
        yield Made(kind, source, way, path, folder, before, root)
        for module in [m for m in sys.modules if m.startswith("contract_package")]:
            del sys.modules[module]


def test_the_first_way_keeps_the_dynamic_dimensions(made: Made) -> None:
    assert made.way == Way(made.kind.way, True)


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_are_those_of_the_source(made: Made, device: str) -> None:
    cases = made.source.cases_for(made.way)
    if device not in made.kind.devices:
        with pytest.raises(DeploykitError), open_session(made.path, device) as session:
            session.run(cases[0].feeds)
        return
    with open_session(made.path, device) as session:
        assert {s.name for s in session.signature.inputs} == set(made.kind.inputs)
        found = [{name: np.array(value) for name, value in session.run(case.feeds).items()} for case in cases]
    parity = compare([case.outputs for case in cases], found)
    assert parity.verdict is Verdict.PASSED, parity.reason
    assert not check_vacuity([case.outputs for case in cases])


def test_cases_cover_batch_one_and_others(made: Made) -> None:
    cases = made.source.cases_for(made.way)
    sizes = [case.sizes["batch"] for case in cases]
    assert len(cases) >= 3
    assert 1 in sizes
    assert len(set(sizes)) >= 3
    for symbol in made.kind.symbols:
        assert len({case.sizes[symbol] for case in cases}) >= 3
    for case in cases:
        assert tuple(case.feeds) == made.kind.inputs
        assert tuple(case.outputs) == made.kind.outputs


def test_names_are_as_planned(made: Made) -> None:
    signature = signature_of(read_model(made.path))
    assert tuple(s.name for s in signature.inputs) == made.kind.inputs
    assert tuple(s.name for s in signature.outputs) == made.kind.outputs
    assert signature == made.source.signature


def test_symbols_are_readable(made: Made) -> None:
    model = read_model(made.path)
    assert signature_of(model).symbols == made.kind.symbols
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    used = {d.dim_param for v in values for d in v.type.tensor_type.shape.dim if d.dim_param}
    strange = [s for s in used if re.fullmatch(r"[su]\d+|unk.*|.*[^\w].*", s)]
    assert not strange
    firsts = {s.shape[0] for s in signature_of(model).inputs if s.shape and isinstance(s.shape[0], str)}
    assert firsts == {"batch"}


def test_nothing_about_this_machine_is_in_the_file(made: Made) -> None:
    data = made.path.read_bytes()
    private = [str(Path.home()), str(made.folder), str(Path.cwd()), "site-packages", "stack_trace", "zoo"]
    assert [word for word in private if word.encode() in data] == []
    model = read_model(made.path, weights=False)
    assert not model.doc_string
    assert [p.key for p in model.metadata_props] == []


def test_file_is_valid_and_complete(made: Made) -> None:
    onnx.checker.check_model(str(made.path), full_check=True)
    model = read_model(made.path, weights=False)
    assert {p.name for p in made.path.parent.iterdir()} == {"model.onnx"} | external_files(model)
    opset = next(o.version for o in model.opset_import if not o.domain)
    # skl2onnx declares the oldest opset that its operators have, at most the one asked for.
    assert opset in {"copy": (17,), "skl2onnx": range(13, 19)}.get(made.way.name, (18,))


def test_source_is_untouched(made: Made) -> None:
    assert _digests(made.root) == made.before


def test_ranges_and_tools_are_known(made: Made) -> None:
    assert set(made.source.ranges) <= set(made.kind.inputs)
    for case in made.source.cases_for(made.way):
        for name, limits in made.source.ranges.items():
            array = case.feeds[name]
            if array.dtype.kind in "iu":
                # Made-up masks have no padding, real ones do.
                assert array.min() >= limits.low or name == "attention_mask"
                assert array.max() <= limits.high
    assert all(re.match(r"\d", version) for version in made.source.tools().values())
    assert made.source.tools()
