"""The folder of a training: what stands in it, written so that a kill at any moment loses nothing that was there.

    folder/
    ├── training.json     the settings and the shape of the data, by which `resume` knows the training again
    ├── last.ckpt         the newest checkpoint: weights, optimizer, schedule, and how far the training is
    ├── best.pt           the weights with the best metric so far, where there is one
    ├── weights.pt        the weights that were kept, once the training is over
    ├── history.json      one entry an epoch
    ├── train.log         what the frameworks printed
    └── logs/             for TensorBoard

Weights and checkpoints are read with torch's `weights_only`: they hold tensors and numbers, and no code.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploykit.errors import OptimizationError, OutputExistsError, first_line, storage_error
from deploykit.extras import require
from deploykit.optimizers.training.config import TrainConfig
from deploykit.staging import check_writable, write_file

WEIGHTS = "weights.pt"
HISTORY = "history.json"
LOGS = "logs"
LOG = "train.log"
_PLAN = "training.json"
_LAST = "last.ckpt"
_BEST = "best.pt"
_ROWS = "rows"


class TrainingFolder:
    """Paths and files of one training.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.path / _LAST

    @property
    def best(self) -> Path:
        """The best weights so far."""
        return self.path / _BEST

    @property
    def rows(self) -> Path:
        """Rows that do not fit into memory."""
        return self.path / _ROWS

    def check(self, *, resume: bool) -> None:
        """See that a training may begin here, or go on, and create the folder.

        Raises:
            OutputExistsError: One is there, and `resume` is not given.
            StorageError: The folder cannot be written.
        """
        if self.begun and not resume:
            raise OutputExistsError(
                f"{self.path} holds a training already",
                hint="go on with it (--resume, or resume=True), or remove it first",
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise storage_error(exc, self.path) or exc from exc
        check_writable(self.path)

    def open(self, config: TrainConfig, data: Mapping[str, Any]) -> bool:
        """Begin a training here, or find out that it is the one that can go on.

        Args:
            config: Its settings.
            data: What tells its data from others.

        Returns:
            Whether there is a checkpoint to go on from.

        Raises:
            OptimizationError: It has other settings or data.
        """
        plan = {"config": asdict(config), "data": dict(data)}
        if self.begun:
            self._check(plan)
            return True
        if self.ours:  # one that ended before its first checkpoint
            shutil.rmtree(self.path / LOGS, ignore_errors=True)
            for name in (LOG, HISTORY, _BEST):
                (self.path / name).unlink(missing_ok=True)
        write_file(self.path / _PLAN, _json(plan), replace=True)
        return False

    def forget(self) -> None:
        """Take a training back that has no checkpoint."""
        if not self.last.exists():
            (self.path / _PLAN).unlink(missing_ok=True)
            self.abandon()

    def abandon(self) -> None:
        """Remove the folder where nothing stands in it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()

    @property
    def begun(self) -> bool:
        """Whether a training is here that can go on."""
        return self.last.exists()

    @property
    def ours(self) -> bool:
        """Whether a training is here, be it one without a checkpoint."""
        return (self.path / _PLAN).exists() or self.begun

    def _check(self, plan: Mapping[str, Any]) -> None:
        file = self.path / _PLAN
        try:
            found = json.loads(file.read_bytes())
            # Settings that came later were at their defaults.
            known = {**asdict(TrainConfig()), **found["config"], **{f"data {k}": v for k, v in found["data"].items()}}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise OptimizationError(
                f"{self.path} is no training to go on with ({first_line(exc)})", hint=f"remove it: rm -r {self.path}"
            ) from exc
        asked = {**plan["config"], **{f"data {k}": v for k, v in plan["data"].items()}}
        changed = [name for name in asked if known.get(name) != asked[name]]
        if changed:
            name = changed[0]
            raise OptimizationError(
                f"{self.path} was begun with {name.replace('_', ' ')} {known.get(name)!r}, not {asked[name]!r}",
                expected="the settings and data that the training was begun with",
                hint="give them again, or train anew into another folder",
            )

    def write_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Replace `history.json`."""
        write_file(self.path / HISTORY, _json(list(history)), replace=True)

    def discard(self) -> None:
        """Remove what only a training that goes on needs, once its weights are kept."""
        self.best.unlink(missing_ok=True)


def save_tensors(value: Any, path: Path) -> None:
    """`torch.save` to a file that is whole or as it was before.

    Raises:
        StorageError: The file system refused.
    """
    torch = require("torch", extra="train")
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as exc:  # torch's zip writer raises its own where the disk is full
        cause = exc if isinstance(exc, OSError) else exc.__context__
        error = storage_error(cause, path) if isinstance(cause, OSError) else None
        if error is None:
            raise
        raise error from exc
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load_tensors(path: Path, device: Any = "cpu") -> Any:
    """Read what `save_tensors` wrote; nothing in it is executed.

    Raises:
        OptimizationError: It cannot be read.
    """
    torch = require("torch", extra="train")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as exc:
        raise OptimizationError(
            f"cannot read {path} ({first_line(exc)})", hint="train anew, into another folder"
        ) from exc


def weights_of(module: Any) -> dict[str, Any]:
    """A module's weights and buffers, copied to the CPU."""
    torch = require("torch", extra="train")
    return {n: v.detach().cpu().clone() if torch.is_tensor(v) else v for n, v in module.state_dict().items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
