"""Keras 3: files in safe mode, names and free dimensions of the signature, both backends."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import pipeline
from deploykit.benchmarks.parity import Verdict, compare
from deploykit.errors import ExportError, SourceError
from deploykit.exporters import ExportOptions, Source, export
from deploykit.exporters.keras_model import open_keras_model
from deploykit.runtimes import open_session

ROOT = Path(__file__).parents[2]


def _right(source: Source, path: Path) -> str:
    way = source.ways[0]
    export(source, way, path)
    cases = source.cases_for(way)
    with open_session(path, "ort:cpu") as session:
        found = compare([c.outputs for c in cases], [session.run(c.feeds) for c in cases])
    return "" if found.verdict is Verdict.PASSED else found.reason


def _two_heads() -> Any:
    """GELU, a table, a depthwise convolution, tensors that a layer holds; inputs and outputs in dictionaries."""
    import keras

    keras.utils.set_random_seed(1)
    layers = keras.layers
    image, ids = keras.Input((12, 12, 3), name="image"), keras.Input((None,), dtype="int32", name="ids")
    scaled = layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[4.0, 5.0, 6.0])(image)
    seen = layers.GlobalAveragePooling2D()(layers.DepthwiseConv2D(3, strides=2)(scaled))
    read = layers.GlobalAveragePooling1D()(layers.Embedding(30, 8)(ids))
    both = layers.Dense(16, activation="gelu")(layers.Concatenate()([seen, read]))
    outputs = {"kind": layers.Dense(3, activation="softmax")(both), "amount": layers.Dense(1)(both)}
    return keras.Model({"image": image, "ids": ids}, outputs)


def test_dictionaries_and_free_dimensions(tmp_path: Path) -> None:
    source = open_keras_model(_two_heads(), ExportOptions(), "two")
    assert {str(s) for s in source.signature} == {
        "image: float32[batch, 12, 12, 3]", "ids: int32[batch, sequence]",
        "kind: float32[batch, 3]", "amount: float32[batch, 1]",
    }  # fmt: skip
    assert source.ranges["ids"].high == 29
    assert _right(source, tmp_path / "m.onnx") == ""


def test_recurrent_layers_keep_their_free_length(tmp_path: Path) -> None:
    import keras

    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input((None, 5), name="x"), keras.layers.LSTM(6), keras.layers.Dense(2)])
    source = open_keras_model(model, ExportOptions(), "lstm")
    assert source.signature.symbols == ("batch", "sequence")
    assert _right(source, tmp_path / "m.onnx") == ""


def test_wishes_for_dimensions(message: Any) -> None:
    import keras

    model = keras.Sequential([keras.Input((None, 4), name="x"), keras.layers.Dense(2)])
    source = open_keras_model(model, ExportOptions(dynamic=("x:0=n,1=steps",)), "wish")
    assert source.signature.symbols == ("n", "steps")
    assert open_keras_model(model, ExportOptions(dynamic=("none",)), "fixed").signature.symbols == ()
    wrong = ExportOptions(dynamic=("x:2=features",))
    assert "fixes axis 2" in message(ExportError, lambda: open_keras_model(model, wrong, "wrong"))
    assert "for PyTorch" in message(
        ExportError, lambda: open_keras_model(model, ExportOptions(way="torchscript"), "way")
    )


def test_lambda_layers_are_refused_unrun(opened: Any, message: Any, tmp_path: Path) -> None:
    import keras

    model = keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: x * 2)])
    model.save(tmp_path / "code.keras")
    text = message(SourceError, lambda: opened(tmp_path / "code.keras"))
    assert "Lambda" in text
    assert "file.py:factory" in text


def test_what_is_no_keras_file(opened: Any, message: Any, tmp_path: Path) -> None:
    (tmp_path / "text.keras").write_text("no archive")
    assert "no zip archive" in message(SourceError, lambda: opened(tmp_path / "text.keras"))
    with zipfile.ZipFile(tmp_path / "empty.keras", "w") as archive:
        archive.writestr("other.txt", "")
    assert "cannot read" in message(SourceError, lambda: opened(tmp_path / "empty.keras"))
    for suffix in (".h5", ".hdf5"):
        (tmp_path / f"old{suffix}").touch()
        assert ".keras" in message(SourceError, lambda suffix=suffix: opened(tmp_path / f"old{suffix}"))


def test_unknown_classes_and_unbuilt_models(opened: Any, message: Any, tmp_path: Path) -> None:
    import keras

    class Own(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return x

    keras.Sequential([keras.Input((3,)), Own()]).save(tmp_path / "own.keras")
    assert "Own" in message(SourceError, lambda: opened(tmp_path / "own.keras"))
    unbuilt = keras.Sequential([keras.layers.Dense(2)])
    assert "no inputs yet" in message(SourceError, lambda: open_keras_model(unbuilt, ExportOptions(), "unbuilt"))
    text = keras.Sequential([keras.Input((), dtype="string"), keras.layers.StringLookup(vocabulary=["a"])])
    assert "string" in message(SourceError, lambda: open_keras_model(text, ExportOptions(), "text"))


def test_subclassed_models_take_the_inputs_of_the_example(message: Any, tmp_path: Path) -> None:
    """They know no inputs, not even after a call; what `call` takes is told by its parameters and the example."""
    import keras

    class Own(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.conv = keras.layers.Conv2D(4, 3, activation="relu")
            self.dense = keras.layers.Dense(2)

    class One(Own):
        def call(self, image: Any, training: bool = False) -> Any:
            mapped = self.conv(image)
            return [mapped, self.dense(keras.ops.mean(mapped, axis=(1, 2)))]

    class Two(Own):
        def call(self, image: Any, weight: Any, training: bool = False) -> Any:
            return {"scores": self.dense(keras.ops.mean(self.conv(image), axis=(1, 2))) * weight}

    class Held(Own):
        def call(self, given: Any) -> Any:
            image, weight = (given["image"], given["weight"]) if isinstance(given, dict) else given
            return self.dense(keras.ops.mean(self.conv(image), axis=(1, 2))) * weight

    class Odd(keras.Model):  # type: ignore[misc]
        def call(self, image: Any) -> Any:
            return np.asarray(image)

    keras.utils.set_random_seed(3)
    rng = np.random.default_rng(0)
    image, weight = rng.standard_normal((4, 9, 10, 3)), rng.standard_normal((4, 2)).astype(np.float32)
    both = {"image": image.astype(np.float32), "weight": weight}
    for number, (model, example, names) in enumerate([
        (One(), image, ["image"]),
        (Two(), (image, weight), ["image", "weight"]),
        (Two(), both, ["image", "weight"]),
        (Held(), [image, weight], ["given_0", "given_1"]),
        (Held(), both, ["image", "weight"]),
    ]):  # fmt: skip
        source = open_keras_model(model, ExportOptions(), "own", example)
        assert [s.name for s in source.signature.inputs] == names
        assert source.signature.inputs[0].shape == ("batch", 9, 10, 3)
        assert not _right(source, tmp_path / f"{number}.onnx")
    free = ExportOptions(dynamic=("image:0=batch,1=rows",))
    source = open_keras_model(One(), free, "own", image)
    assert source.signature.inputs[0].shape == ("batch", "rows", 10, 3)
    assert not _right(source, tmp_path / "free.onnx")
    assert "symbolic" in message(SourceError, lambda: open_keras_model(Odd(), ExportOptions(), "own", image))
    assert "(model, example)" in message(SourceError, lambda: open_keras_model(One(), ExportOptions(), "own"))


def test_quantization_and_data(build: Any, tmp_path: Path) -> None:
    build.trained.keras_file(tmp_path / "net.keras")
    pixels, labels = build.trained.images()
    np.savez(tmp_path / "data.npz", image=pixels[:128], labels=labels[:128])
    pipeline.export(tmp_path / "net.keras", tmp_path / "fp32", data=tmp_path / "data.npz")
    pipeline.simplify(tmp_path / "fp32", tmp_path / "simple")
    pipeline.quantize_static(tmp_path / "simple", tmp_path / "int8", data=tmp_path / "data.npz")
    with open_session(tmp_path / "int8", "ort:cpu") as session:
        found = session.run({"image": pixels[1200:]})["output"].argmax(1)
    expected = np.asarray(build.trained.network()(pixels[1200:])).argmax(1)
    assert (found == expected).mean() > 0.97


def test_torch_backend_needs_no_tensorflow(build: Any, tmp_path: Path) -> None:
    """In a process of its own: Keras takes one backend a process."""
    build.trained.keras_file(tmp_path / "net.keras")
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from deploykit import pipeline\n"
        f"made = pipeline.export({str(tmp_path / 'net.keras')!r}, {str(tmp_path / 'out')!r}, exporter='torchscript')\n"
        "print(made.manifest.lineage[0].params['exporter'], made.signature.inputs[0])\n"
    )
    env = os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "torchscript image: float32[batch, 8, 8, 1]"
