"""Settings of a training: what is wrong, or would be ignored, is said before anything runs."""

import pytest

from deploykit.errors import OptimizationError
from deploykit.optimizers.training import TrainConfig, check_train_config


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"epochs": 0}, "epochs 0"),
        ({"epochs": 2.5}, "integer"),
        ({"epochs": True}, "epochs True"),
        ({"batch_size": -1}, "batch size"),
        ({"optimizer": "lion"}, "adamw or adam"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"learning_rate": float("nan")}, "learning rate"),
        ({"learning_rate": "fast"}, "learning rate"),
        ({"schedule": "linear"}, "one-cycle"),
        ({"warmup": 1.0}, "warmup"),
        ({"schedule": "plateau", "warmup": 0.1}, "no warm-up"),
        ({"schedule": "one-cycle", "warmup": 0.0}, "one-cycle"),
        ({"weight_decay": -1.0}, "weight decay"),
        ({"loss": "hinge"}, "focal"),
        ({"loss": "mse", "label_smoothing": 0.1}, "label smoothing does nothing"),
        ({"focal_gamma": 3.0}, "focal gamma does nothing"),
        ({"momentum": 0.5}, "momentum does nothing"),
        ({"loss": "ctc", "mixup": 0.2}, "mixup does nothing"),
        ({"dropout": 1.0}, "dropout"),
        ({"ema": 0.0}, "ema"),
        ({"ema": 1.0}, "ema"),
        ({"clip_norm": 0.0}, "clip norm"),
        ({"patience": 0}, "patience"),
        ({"metric": ""}, "metric"),
        ({"precision": "fp8"}, "bf16"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"checkpoint_minutes": 0}, "checkpoint minutes"),
        ({"trim_padding": "yes"}, "trim padding"),
    ],
)
def test_wrong_settings_are_named(settings, word):
    with pytest.raises(OptimizationError) as caught:
        check_train_config(TrainConfig(**settings))
    assert word in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_norm": None, "ema": 0.999, "dropout": 0.0, "patience": 3, "mixup": 0.2, "label_smoothing": 0.1},
        {"schedule": "one-cycle", "warmup": 0.25, "optimizer": "sgd", "momentum": 0.95},
        {"schedule": "plateau", "loss": "focal", "focal_gamma": 0.5, "learning_rate": 1, "metric": "loss"},
    ],
)
def test_right_settings_pass(settings):
    check_train_config(TrainConfig(**settings))


def test_warmup_follows_the_schedule():
    shares = {name: TrainConfig(schedule=name).warmup_share for name in ("cosine", "one-cycle", "plateau", "step")}
    assert shares == {"cosine": 0.05, "one-cycle": 0.3, "plateau": 0.0, "step": 0.05}
    assert TrainConfig(warmup=0.0).warmup_share == 0.0
