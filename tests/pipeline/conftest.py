from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deploykit
from deploykit import runner
from deploykit.recipe import Recipe


@pytest.fixture(scope="session")
def digits():
    """The module `digits.py`, which stands beside this file: a really trained network, spoiled on request."""
    spec = importlib.util.spec_from_file_location("_digits", Path(__file__).with_name("digits.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes scikit-learn's digits, 0 to 1, under the name and in the shape that a module takes."""

    def write(name: str, *shape: int) -> Path:
        from sklearn.datasets import load_digits

        folder = tmp_path_factory.mktemp("digits")
        rows, labels = load_digits(return_X_y=True)
        rows = (rows / 16).astype(np.float32).reshape(-1, *shape)
        np.savez(folder / "unlabelled.npz", **{name: rows[:1200]})
        np.savez(folder / "train.npz", **{name: rows[:1200]}, labels=labels[:1200])
        np.savez(folder / "eval.npz", **{name: rows[1200:]}, labels=labels[1200:])
        return folder

    return write


@pytest.fixture(scope="session")
def taught() -> Callable[[Any, Path, int], Any]:
    """Trains a module on `train.npz` for some epochs, in a plain loop of torch."""

    def teach(net: Any, folder: Path, epochs: int) -> Any:
        import torch

        with np.load(folder / "train.npz") as data:
            (name,) = (n for n in data.files if n != "labels")
            rows, labels = torch.tensor(data[name]), torch.tensor(data["labels"])
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(epochs):
            for index in torch.randperm(len(rows)).split(100):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(rows[index]), labels[index]).backward()
                optimizer.step()
        return net.eval()

    return teach


@pytest.fixture
def asked_by_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], dict[str, Any]]:
    """What the recipe that a command prints (`--dry-run`) asks of the verb."""

    def ask(told: Sequence[str]) -> dict[str, Any]:
        from click.testing import CliRunner

        from deploykit.cli import cli

        printed = CliRunner().invoke(cli, [*told, "--dry-run"])
        assert printed.exit_code == 0, printed.output
        (tmp_path / "r.toml").write_text(printed.output)
        seen: dict[str, Any] = {}

        def verb(source: str, output: Path, **options: Any) -> Any:
            seen.update(options, source=source, output=output)
            raise KeyboardInterrupt

        monkeypatch.setattr(runner.pipeline, told[0], verb)
        with pytest.raises(KeyboardInterrupt):
            deploykit.run(Recipe.load(tmp_path / "r.toml"), tmp_path / "out")
        return seen

    return ask
