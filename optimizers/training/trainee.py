"""A course as Lightning takes it: its module, its steps, and its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.extras import require
from deploykit.optimizers.training.config import TrainConfig
from deploykit.optimizers.training.course import Course
from deploykit.optimizers.training.folder import LOGS, TrainingFolder, load_tensors, save_tensors
from deploykit.optimizers.training.updates import make_optimizer, make_schedule

STATE = "deploykit"
_PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def make_trainee(course: Course, folder: TrainingFolder) -> Any:
    """The LightningModule of a course."""
    lightning = require("pytorch_lightning", extra="train")
    torch = require("torch", extra="train")

    class Trainee(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.module = course.module
            self.average = course.average
            # Connectors of a distillation are trained and kept along.
            self.task = course.objective if isinstance(course.objective, torch.nn.Module) else None

        def train_dataloader(self) -> Any:
            return course.batches

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = make_optimizer(course.config, [m for m in (self.module, self.task) if m is not None])
            schedule = make_schedule(course.config, optimizer, course.steps, higher_is_better=course.higher_is_better)
            told: dict[str, Any] = {"scheduler": schedule, "interval": "step"}
            if course.config.schedule == "plateau":
                # Lightning would take its step after the checkpoint of an epoch; see `on_train_epoch_end`.
                told |= {"interval": "epoch", "reduce_on_plateau": True, "monitor": "nothing", "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": told}

        def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Any:
            return course.run_step(batch)

        def on_train_start(self) -> None:
            course.begin()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            course.seed_step()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            course.end_step(self.save, self.logger.log_metrics, self.rate)

        def on_train_epoch_end(self) -> None:
            plateau = self.lr_schedulers() if course.config.schedule == "plateau" else None
            course.end_epoch(self.rate, plateau, self.logger.log_metrics)
            self.trainer.should_stop = bool(course.stopped)
            self.save()
            self.logger.experiment.flush()
            course.saved_epoch()

        @property
        def rate(self) -> float:
            """The learning rate."""
            return float(self.trainer.optimizers[0].param_groups[0]["lr"])

        def save(self) -> None:
            """Write the checkpoint."""
            course.check_weights()
            self.trainer.save_checkpoint(folder.last)
            folder.keep_best(course.best_epoch)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint[STATE] = course.state()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            course.restore(checkpoint[STATE])

    return Trainee()


def make_trainer(config: TrainConfig, folder: TrainingFolder, precision: str, *, begun_at: int) -> Any:
    """A Lightning trainer on one device, without any of its own talk and files.

    Args:
        config: Epochs and clipping.
        folder: Where logs go.
        precision: "fp32", "bf16" or "fp16".
        begun_at: Steps that were taken already; what the logs hold after them gives way.
    """
    lightning = require("pytorch_lightning", extra="train")
    loggers = require("pytorch_lightning.loggers", extra="train")
    environments = require("pytorch_lightning.plugins.environments", extra="train")
    torch = require("torch", extra="train")
    logger = loggers.TensorBoardLogger(
        folder.path,
        name="",
        version=LOGS,
        default_hp_metric=False,
        **({"purge_step": begun_at + 1} if begun_at else {}),
    )
    return lightning.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=1,
        precision=_PRECISIONS[precision],
        max_epochs=config.epochs,
        gradient_clip_val=config.clip_norm,
        logger=logger,
        # The environment is named, so that a job of Slurm or torchrun around us is not taken for a part of this one.
        plugins=[_checkpoint_files(), environments.LightningEnvironment()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder.path,
        log_every_n_steps=1,
    )


def _checkpoint_files() -> Any:
    """Lightning's plugin for checkpoint files; ours are flushed before they take their place, and hold no code."""
    io = require("pytorch_lightning.plugins.io", extra="train")

    class Files(io.CheckpointIO):  # type: ignore[misc,name-defined]
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            save_tensors(checkpoint, Path(path))

        def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> Any:
            return load_tensors(Path(path))

        def remove_checkpoint(self, path: Any) -> None:
            Path(path).unlink(missing_ok=True)

    return Files()


def precision_of(asked: str) -> tuple[str, str]:
    """The precision to train in, and why where that was our choice."""
    torch = require("torch", extra="train")
    if asked != "auto":
        return asked, ""
    if not torch.cuda.is_available():
        return "fp32", ""
    kind = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return kind, f"trained in mixed precision ({kind}) on {torch.cuda.get_device_name()}; --precision fp32 for none"
