"""`deploykit prune`: what the command line hands on, and what it refuses."""

import tomllib

from deploykit.recipe import Recipe


def test_a_dry_run_prints_a_recipe_that_can_be_read(cli):
    done = cli(
        "prune", "net.py:make", "-o", "small", "--speedup", "2", "--data", "d.npz", "--epochs", "3", "--steps", "2",
        "--keep", "head", "--max-drop", "1%", "--clip-norm", "0", "--dry-run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (step,) = Recipe.from_tables(tomllib.loads(done.stdout), None).steps.values()
    assert (step.speedup, step.epochs, step.steps, step.keep, step.recovery) == (2.0, 3, 2, ["head"], True)
    assert (step.clip_norm, step.max_drop, step.ratio) == (0.0, "1%", None)


def test_settings_of_a_training_that_is_not_done_are_wrong_usage(cli):
    for option, *args in (
        ["--epochs", "--epochs", "3"],
        ["--learning-rate", "--data", "d.npz", "--no-recovery", "--learning-rate", "0.1"],
        ["--resume", "--resume"],
    ):
        done = cli("prune", "net.py:make", "-o", "small", "--ratio", "0.5", *args)
        assert done.returncode == 2
        assert f"{option} is for the training after pruning" in done.stderr


def test_errors_are_one_line(cli):
    done = cli("prune", "missing.py:make", "-o", "small")
    assert done.returncode == 1
    assert done.stderr.startswith("error: one goal is needed")
    assert done.stderr.count("\n") == 1
