"""Commands that train: the recipe that one prints asks for what the command itself asks for."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from deploykit import pipeline, runner
from deploykit.errors import OptionError
from deploykit.progress import Progress
from deploykit.recipe import Recipe

SHARED = (
    "--data", "d.npz", "--eval", "e.npz", "--epochs", "3", "--batch", "16", "--optimizer", "sgd", "--momentum", "0.5",
    "--learning-rate", "0.02", "--schedule", "step", "--warmup", "0.1", "--weight-decay", "0.1", "--loss", "focal",
    "--label-smoothing", "0.1", "--focal-gamma", "1", "--dropout", "0.2", "--ema", "0.9", "--clip-norm", "0",
    "--patience", "2", "--precision", "fp32", "--seed", "7", "--checkpoint-minutes", "1", "--metric", "f1",
    "--dynamic", "x:0=n", "--input", "x=float32[n,4]", "--dim", "n=3", "--opset", "17", "--task", "t", "--for",
    "ort:1.18", "--device", "ort:cpu",
)  # fmt: skip
COMMANDS = {
    "finetune": ("--mixup", "0.1", "--part", "encoder"),
    "distill": (
        "--student", "derive:layers=2", "--max-drop", "1%", "--kind", "classification", "--temperature", "2",
        "--weight", "features=2", "--features", "a=b", "--attention-layers", "all", "--embedding-loss", "mse",
        "--output-name", "y", "--cache", "off",
    ),
    "prune": (
        "--speedup", "2", "--max-drop", "0.02", "--steps", "2", "--round-to", "8", "--importance", "taylor",
        "--allocation", "uniform", "--max-ratio", "0.5", "--keep", "head", "--allow-slower", "--gate-seconds", "2",
        "--part", "encoder", "--allow-unverified",
    ),
    "quantize qat": (
        "--mixup", "0.1", "--max-drop", "1%", "--weight-bits", "7", "--allow-slower", "--gate-seconds", "2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_asks_for_what_its_command_asks_for(
    name: str, plain: bool, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def verb(source: str, output: Any, *, progress: Any, **given: Any) -> None:
        seen.append({"source": source, **given})
        raise OptionError("seen")

    monkeypatch.setattr(pipeline, name.replace(" ", "_"), verb)
    needed = [*SHARED[:2], *COMMANDS[name][:2]] if plain else [*SHARED, *COMMANDS[name]]
    command = [*name.split(), "net.py:make", "-o", "out", *needed]
    done = cli(*command)
    assert done.returncode == 1, done.stderr
    assert "seen" in done.stderr
    printed = cli(*command, "--dry-run")
    assert printed.returncode == 0, printed.stderr
    recipe = Recipe.from_tables(tomllib.loads(printed.stdout), Path())
    (step,) = recipe.steps
    with pytest.raises(OptionError):
        runner._run_step(recipe, step, recipe.steps[step], tmp_path, None, Progress(), resume=False)
    by_command, by_recipe = ({k: v for k, v in found.items() if v not in ((), [], None, False)} for found in seen)
    assert by_recipe == by_command
