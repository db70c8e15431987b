"""SavedModels: which signature, what is refused, which operator has no ONNX form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.benchmarks.parity import Verdict, compare
from deploykit.errors import ExportError, SourceError
from deploykit.exporters import export
from deploykit.runtimes import open_session


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two signatures; one takes and gives several tensors, and captures a variable and a constant."""
    import tensorflow as tf

    class Module(tf.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.weight = tf.Variable(np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3))
            self.shift = tf.constant([1.0, 2.0, 3.0])

        @tf.function(input_signature=[tf.TensorSpec([None, 4], name="x"), tf.TensorSpec([None, 3], name="y")])
        def both(self, x: Any, y: Any) -> Any:
            return {"total": x @ self.weight + y + self.shift, "gap": tf.math.erfc(y)}

        @tf.function(input_signature=[tf.TensorSpec([2, 4], name="x")])
        def one(self, x: Any) -> Any:
            return {"out": tf.nn.relu(x)}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
        def words(self, text: Any) -> Any:
            return {"length": tf.strings.length(text)}

        @tf.function(input_signature=[tf.TensorSpec([None], name="x")])
        def odd(self, x: Any) -> Any:
            return {"out": tf.math.bessel_i0e(x)}

        @tf.function(input_signature=[tf.TensorSpec([None], name="x")])
        def files(self, x: Any) -> Any:
            tf.io.write_file("written-by-a-model", "x")
            return {"out": x + 1}

    folder = tmp_path_factory.mktemp("tensorflow") / "saved"
    module = Module()
    names = {name: getattr(module, name) for name in ("both", "one", "words", "odd", "files")}
    tf.saved_model.save(module, str(folder), signatures=names)
    return folder


def test_a_named_signature_with_several_tensors(saved: Path, opened: Any, tmp_path: Path) -> None:
    source = opened(f"{saved}:both")
    assert [str(s) for s in source.signature] == [
        "x: float32[batch, 4]", "y: float32[batch, 3]", "gap: float32[batch, 3]", "total: float32[batch, 3]",
    ]  # fmt: skip
    export(source, source.ways[0], tmp_path / "m.onnx")
    with open_session(tmp_path / "m.onnx", "ort:cpu") as session:
        found = compare([c.outputs for c in source.cases], [session.run(c.feeds) for c in source.cases])
    assert found.verdict is Verdict.PASSED, found.reason


def test_fixed_shapes_stay_fixed(saved: Path, opened: Any, tmp_path: Path) -> None:
    source = opened(f"{saved}:one")
    assert str(source.signature.inputs[0]) == "x: float32[2, 4]"
    export(source, source.ways[0], tmp_path / "m.onnx")


def test_a_signature_has_to_be_chosen(saved: Path, opened: Any, message: Any) -> None:
    assert f"{saved}:both" in message(SourceError, lambda: opened(saved))
    assert "no signature 'none'" in message(SourceError, lambda: opened(f"{saved}:none"))


def test_an_optimizer_that_nobody_knows_any_more(opened: Any, tmp_path: Path) -> None:
    """Older Keras saves its optimizer's moments with the model, and Keras 3 knows no class to load them into."""
    import tensorflow as tf

    class Trained(tf.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.weight = tf.Variable(np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3))
            self.optimizer = tf.compat.v1.train.AdamOptimizer(0.1)

        @tf.function(input_signature=[tf.TensorSpec([None, 4], name="x")])
        def serve(self, x: Any) -> Any:
            return {"y": tf.tanh(x @ self.weight)}

        @tf.function
        def learn(self, x: Any) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(self.serve(x)["y"] ** 2)
            self.optimizer.apply_gradients([(tape.gradient(loss, self.weight), self.weight)])

    module = Trained()
    module.learn(tf.ones([2, 4]))
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures=module.serve)
    with pytest.raises(AttributeError, match="add_slot"):
        tf.saved_model.load(str(tmp_path / "saved"))
    source = opened(tmp_path / "saved")
    export(source, source.ways[0], tmp_path / "m.onnx")
    feeds = {"x": np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 4)}
    with open_session(tmp_path / "m.onnx", "ort:cpu") as session:
        made = session.run(feeds)["y"]
    np.testing.assert_allclose(made, np.tanh(feeds["x"] @ module.weight.numpy()), rtol=1e-5)


def test_what_is_refused(
    saved: Path, opened: Any, message: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "string" in message(SourceError, lambda: opened(f"{saved}:words"))
    assert "WriteFile" in message(SourceError, lambda: opened(f"{saved}:files"))
    assert not (tmp_path / "written-by-a-model").exists()
    odd = opened(f"{saved}:odd")
    assert "BesselI0e" in message(ExportError, lambda: export(odd, odd.ways[0], tmp_path / "m.onnx"))


def test_damaged_directory(opened: Any, message: Any, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"\x08\x01nonsense")
    assert "cannot read" in message(SourceError, lambda: opened(tmp_path / "saved"))


def test_what_loading_would_run(opened: Any, message: Any, tmp_path: Path) -> None:
    """A resource's initializer runs while TensorFlow loads the model."""
    import tensorflow as tf

    class Resource(tf.saved_model.experimental.TrackableResource):  # type: ignore[misc,name-defined]
        def _create_resource(self) -> Any:
            return tf.raw_ops.MutableHashTableV2(key_dtype=tf.int64, value_dtype=tf.int64)

        def _initialize(self) -> None:
            write(tf.constant("run"))

    @tf.function  # type: ignore[untyped-decorator]
    def write(text: Any) -> None:
        tf.io.write_file(str(tmp_path / "evil"), text)

    class Module(tf.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.resource = Resource()

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])  # type: ignore[untyped-decorator]
        def __call__(self, x: Any) -> dict[str, Any]:
            return {"y": x + 1.0}

    module = Module()
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures=module.__call__)
    (tmp_path / "evil").unlink(missing_ok=True)
    assert "WriteFile" in message(SourceError, lambda: opened(tmp_path / "saved"))
    assert not (tmp_path / "evil").exists()
