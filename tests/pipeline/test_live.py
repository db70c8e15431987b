"""Models of a training script: exported where they are, and left as they were."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_wine
from sklearn.ensemble import RandomForestClassifier
from torch import nn

import deploykit
from deploykit.errors import OptionError, SourceError
from deploykit.extras import available


class Net(nn.Module):
    """Everything whose mode matters: dropout, batch normalization, and a part that is frozen in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.frozen = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 64, 10)

    def forward(self, image: Any) -> Any:
        return self.head(self.frozen(self.features(image)).flatten(1))


class Training:
    """A few steps of a real training on digits."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor((images / 16).astype("float32")).reshape(-1, 1, 8, 8)
        self.labels = torch.tensor(labels)
        self.net = Net()
        self.optimizer = torch.optim.Adam(self.net.parameters(), 2e-3)
        self.net.train()
        self.net.frozen.eval()

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            rows = torch.randint(0, 1200, (64,))
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.net(self.images[rows]), self.labels[rows])
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses


def state(net: nn.Module) -> dict[str, Any]:
    """All that an export could change."""
    return {
        "modes": {n: p.training for n, p in net.named_modules()},
        "identities": [id(p) for p in net.parameters()],
        "places": [(p.data_ptr(), str(p.device), p.dtype, p.requires_grad) for p in net.parameters()],
        "values": {n: v.clone() for n, v in net.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "hooks": [
            {k: list(v) for k, v in vars(p).items() if k.endswith("_hooks") and hasattr(v, "keys")}
            for p in net.modules()
        ],
        "attributes": [sorted(vars(p)) for p in net.modules()],
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before.keys() - {"values", "gradients"}:
        assert before[key] == after[key], key
    assert all(torch.equal(before["values"][n], after["values"][n]) for n in before["values"])
    assert all(a is b or torch.equal(a, b) for a, b in zip(before["gradients"], after["gradients"], strict=True))


def test_a_module_is_exported_in_the_middle_of_its_training(tmp_path: Path) -> None:
    undisturbed, training = Training(), Training()
    torch.manual_seed(1)
    expected = undisturbed.steps(20) + undisturbed.steps(5)
    torch.manual_seed(1)
    losses = training.steps(20)
    calls: list[str] = []
    training.net.features.register_forward_hook(lambda *_: calls.append("hook"))
    before = state(training.net)
    artifact = deploykit.export(training.net, tmp_path / "out", training.images[:4], devices=["ort:cpu"])
    same(before, state(training.net))
    assert losses + training.steps(5) == expected  # the same random numbers, the same weights
    assert expected[-1] < expected[0]

    assert artifact.manifest.lineage[0].params["source"] == f"module Net of {Net.__module__}"
    assert artifact.manifest.lineage[0].params["kind"] == "pytorch"
    assert any("training mode" in note for note in artifact.manifest.lineage[0].notes)
    assert artifact.signature.inputs[0].shape == ("batch", 1, 8, 8)
    snapshot = copy.deepcopy(training.net)
    snapshot.load_state_dict(before["values"])
    images = training.images[1200:1300]
    with torch.no_grad():
        reference = snapshot.eval()(images).numpy()
    with deploykit.load(artifact) as session:
        (found,) = session.run({"image": images.numpy()}).values()
    np.testing.assert_allclose(found, reference, atol=1e-4)
    assert (found.argmax(1) == training.labels[1200:1300].numpy()).mean() > 0.8


@pytest.mark.parametrize("around", ["no_grad", "inference_mode", "autocast"])
def test_what_is_around_the_call_does_not_count(tmp_path: Path, around: str) -> None:
    training = Training()
    training.steps(3)
    context = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }[around]
    with context:
        artifact = deploykit.export(training.net, tmp_path / "out", training.images[:4], devices=["ort:cpu"])
        enabled = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    assert enabled == (around == "autocast", around == "inference_mode", around == "autocast")
    assert [r["verdict"] for r in artifact.manifest.evidence.parity] == ["passed"]
    assert training.steps(1)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x: Any, batch: dict[str, Any], scale: float = 1.0) -> Any:
        return self.one(x) * scale + self.two(batch["y"])


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_example_inputs_are_those_of_a_factory(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 4), torch.randn(2, 5)
    examples = (x, {"y": y}) if kind == "tuple" else {"x": x, "batch": {"y": y}, "scale": 2.0}
    artifact = deploykit.export(Pair(), tmp_path / "out", example_inputs=examples, devices=["ort:cpu"])
    assert [s.name for s in artifact.signature.inputs] == ["x", "batch_y"]
    assert any("scale" in n for n in artifact.manifest.lineage[0].notes) == (kind == "dict")


def test_inputs_may_be_described(tmp_path: Path) -> None:
    artifact = deploykit.export(
        nn.Sequential(nn.Linear(4, 3), nn.Tanh()), tmp_path / "out", inputs=["input=float32[batch,4]"]
    )
    assert artifact.manifest.lineage[0].params["source"] == "module Sequential of torch.nn.modules.container"


def test_wrappers_are_taken_off_the_copy_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    inner[0] = torch.compile(inner[0])  # type: ignore[assignment]
    wrapped = nn.DataParallel(inner)
    deploykit.export(wrapped, tmp_path / "out", torch.randn(2, 4), devices=["ort:cpu"])
    assert wrapped.module is inner
    assert hasattr(inner[0], "_orig_mod")


def test_what_forward_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    """The old weight_norm keeps a weight with a history, which copy.deepcopy refuses."""
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(4, 8))
    net = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 3))
    net(torch.randn(2, 4)).sum().backward()
    with pytest.raises(RuntimeError):
        copy.deepcopy(net)
    before = state(net)
    deploykit.export(net, tmp_path / "out", torch.randn(2, 4), devices=["ort:cpu"])
    same(before, state(net))


def test_an_estimator(tmp_path: Path) -> None:
    rows, labels = load_wine(return_X_y=True)
    forest = RandomForestClassifier(20, random_state=0).fit(rows[::2], labels[::2])
    artifact = deploykit.export(forest, tmp_path / "out", rows[1::2], devices=["ort:cpu"])
    assert artifact.manifest.lineage[0].params["source"].startswith("estimator RandomForestClassifier of sklearn.")
    with deploykit.load(artifact) as session:
        (name,) = [s.name for s in artifact.signature.inputs]
        found = session.run({name: rows[1::2].astype(artifact.signature.inputs[0].dtype)})
    np.testing.assert_array_equal(found["label"], forest.predict(rows[1::2]))


_KERAS = """
import os, sys
os.environ["KERAS_BACKEND"] = sys.argv[1]
import json, numpy as np, keras, deploykit

images, labels = np.load("digits.npz").values()
net = keras.Sequential([keras.Input((64,), name="image"), keras.layers.Dense(32, "relu"), keras.layers.Dropout(0.2),
                        keras.layers.Dense(10)])
net.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
net.fit(images[:1200], labels[:1200], epochs=4, batch_size=100, verbose=0)
before = [w.copy() for w in net.get_weights()]
artifact = deploykit.export(net, "out", images[:4], devices=["ort:cpu"])
assert all((a == b).all() for a, b in zip(before, net.get_weights()))
with deploykit.load("out") as session:
    (found,) = session.run({artifact.signature.inputs[0].name: images[1200:]}).values()
wanted = np.asarray(net.predict(images[1200:], verbose=0))
net.fit(images[:1200], labels[:1200], epochs=1, batch_size=100, verbose=0)  # its training goes on
print(json.dumps([artifact.manifest.lineage[0].params["source"], float(abs(found - wanted).max()),
                  float((found.argmax(1) == labels[1200:]).mean())]))
"""


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_a_keras_model(tmp_path: Path, backend: str) -> None:
    if not (available("keras") and available(backend)):
        pytest.skip(f"Keras with {backend} is not installed; run: pip install -e '.[dev]'")
    images, labels = load_digits(return_X_y=True)
    np.savez(tmp_path / "digits.npz", images=(images / 16).astype("float32"), labels=labels)
    done = subprocess.run(
        [sys.executable, "-c", _KERAS, backend], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    label, error, accuracy = json.loads(done.stdout.splitlines()[-1])
    assert label.startswith("model Sequential of keras.")
    assert error < 1e-4
    assert accuracy > 0.7


_SCRIPT = """
import torch, deploykit
class Net(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x)
if __name__ == "__main__":
    net = Net(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    made = deploykit.export(net, "out", torch.randn(2, 4), devices=["ort:cpu"])
    print(made.manifest.lineage[0].params["source"])
"""


def test_the_lineage_names_the_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(_SCRIPT)
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "module Net of train.py"


class Trainer:
    def __init__(self) -> None:
        self.lock = threading.Lock()


def attached() -> nn.Module:
    net = nn.Linear(4, 3)
    net.trainer = Trainer()  # type: ignore[assignment]
    return net


def meta() -> nn.Module:
    return nn.Linear(4, 3, device="meta")


WRONG: list[tuple[Any, Any, str]] = [
    (lambda: nn.Linear(4, 3), None, "without example inputs"),
    (lambda: nn.Linear(4, 3), (torch.zeros(1, 4), torch.zeros(1)), "do not fit forward"),
    (lambda: nn.Linear(4, 3), np.zeros((1, 4), np.float32), "torch.from_numpy"),
    (lambda: nn.Linear(4, 3), torch.zeros(2, 5), "module Linear of torch.nn.modules.linear"),
    (lambda: nn.Linear, torch.zeros(1, 4), "a type cannot be exported"),
    (lambda: len, None, "cannot be exported"),
    (lambda: None, None, "a NoneType cannot be exported"),
    (lambda: {"weights": torch.zeros(1)}, None, "a dict cannot be exported"),
    (attached, torch.zeros(1, 4), "cannot be copied"),
    (meta, torch.zeros(1, 4), "meta"),
    (lambda: RandomForestClassifier(), np.zeros((1, 4)), "not fitted"),
]


@pytest.mark.parametrize(("model", "examples", "said"), WRONG, ids=range(len(WRONG)))
def test_what_cannot_be_exported(tmp_path: Path, model: Any, examples: Any, said: str) -> None:
    with pytest.raises(SourceError) as caught:
        deploykit.export(model(), tmp_path / "out", examples)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_a_source_on_disk_has_its_own_inputs(folder: Path) -> None:
    with pytest.raises(OptionError, match="has inputs of its own"):
        deploykit.export("net.py:make", "out", torch.zeros(1, 4))
    with pytest.raises(SourceError, match="becomes one graph"):
        deploykit.export_parts(nn.Linear(4, 3), "out")  # type: ignore[arg-type]
