"""The folder of a training: what stands in it, written so that a kill at any moment loses nothing that was there.

    folder/
    ├── training.json     settings, source and data, by which `resume` knows the training again
    ├── last.ckpt         the newest checkpoint: weights, optimizer, schedule, and how far the training is
    ├── best-N.pt         the weights with the best metric so far, of epoch N, where there is one
    ├── weights.pt        the weights that were kept, once the training is over
    ├── history.json      one entry an epoch
    ├── train.log         what the frameworks printed
    └── logs/             for TensorBoard

A checkpoint names the epoch whose weights are its best, and those of an earlier one go only after it is written: after
a kill, checkpoint and best weights are of one run. Both are read with torch's `weights_only`: they hold tensors and
numbers, and no code.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploykit.errors import OptimizationError, OutputExistsError, first_line, storage_error
from deploykit.extras import require
from deploykit.optimizers.training.config import TrainConfig
from deploykit.staging import check_free, check_writable, write_file

WEIGHTS = "weights.pt"
HISTORY = "history.json"
LOGS = "logs"
LOG = "train.log"
_PLAN = "training.json"
_LAST = "last.ckpt"
_BEST = "best-{}.pt"
_ROWS = "rows"
# Of the settings, what changes no number.
_INDIFFERENT = ("checkpoint_minutes",)


def settings_of(config: TrainConfig, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a training is known by before anything is read: its settings, and whatever else its verb says of it."""
    return {
        "config": {name: value for name, value in asdict(config).items() if name not in _INDIFFERENT},
        "about": dict(about or {}),
    }


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

    def best(self, epoch: int) -> Path:
        """The best weights so far, where they are those after some epoch."""
        return self.path / _BEST.format(epoch)

    @property
    def rows(self) -> Path:
        """Rows that do not fit into memory."""
        return self.path / _ROWS

    @property
    def begun(self) -> bool:
        """Whether a training is here that can go on, or has ended."""
        return self.last.exists() or (self.path / WEIGHTS).exists()

    @property
    def ours(self) -> bool:
        """Whether a training is here, be it one without a checkpoint."""
        return (self.path / _PLAN).exists() or self.begun

    def check(self, plan: Mapping[str, Any], *, resume: bool) -> None:
        """See that a training may begin here, or go on; nothing is written.

        Args:
            plan: What is known of the training so far; see `settings_of`.
            resume: Whether it may go on.

        Raises:
            OutputExistsError: One is there and `resume` is not given, or something else is.
            OptimizationError: The one that is there is another training.
        """
        if self.begun and not resume:
            raise OutputExistsError(
                f"{self.path} holds a training already",
                hint=f"go on with it: --resume (resume=True); or remove it: rm -r {self.path}",
            )
        if self.begun:
            self._compare(plan)
        elif not self.ours and (not self.path.is_dir() or any(self._others())):
            check_free(self.path)

    def begin(self) -> None:
        """Create the folder, and mark it as ours.

        Raises:
            StorageError: It cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise storage_error(exc, self.path) or exc from exc
        check_writable(self.path)
        if not self.ours:
            write_file(self.path / _PLAN, _json({}), replace=True)

    def open(self, plan: Mapping[str, Any]) -> bool:
        """Begin a training here, or find out that it is the one that can go on.

        Args:
            plan: All that tells it from others, a section each: "config", "about", "data", "eval_data" and "module".

        Returns:
            Whether there is a checkpoint to go on from.

        Raises:
            OptimizationError: It is another one.
        """
        self._sweep()
        if self.begun:
            self._compare(plan)
            return True
        self._clear()  # what one left that ended before its first checkpoint
        write_file(self.path / _PLAN, _json(plan), replace=True)
        return False

    def forget(self) -> None:
        """Take a training back that has no checkpoint."""
        if self.begun or not self.ours:
            return
        self._clear()
        self._sweep()
        (self.path / _PLAN).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def write_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Replace `history.json`."""
        write_file(self.path / HISTORY, _json(list(history)), replace=True)

    def keep_best(self, epoch: int | None) -> None:
        """Remove the best weights but those of one epoch, which the checkpoint names."""
        for file in self.path.glob(_BEST.format("*")):
            if epoch is None or file != self.best(epoch):
                file.unlink(missing_ok=True)

    def _others(self) -> Iterator[Path]:
        """What is not the beginning of a training that was killed."""
        return (file for file in self.path.iterdir() if not file.name.startswith(f".{_PLAN}.tmp-"))

    def _clear(self) -> None:
        for name in (LOGS, _ROWS):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (LOG, HISTORY):
            (self.path / name).unlink(missing_ok=True)
        self.keep_best(None)

    def _sweep(self) -> None:
        """Remove what a kill left of files that were being written."""
        for pattern in (".*.tmp-*", ".*.new"):
            for file in self.path.glob(pattern):
                with contextlib.suppress(OSError):
                    file.unlink()

    def _compare(self, plan: Mapping[str, Any]) -> None:
        file = self.path / _PLAN
        try:
            known = _flat(json.loads(file.read_bytes()))
        except (OSError, ValueError, TypeError, AttributeError) as exc:
            raise OptimizationError(
                f"{self.path} is no training to go on with ({first_line(exc)})", hint=f"remove it: rm -r {self.path}"
            ) from exc
        asked = _flat(json.loads(_json(plan)))
        changed = next((name for name, value in asked.items() if known.get(name) != value), None)
        if changed is None:
            return
        values = f"{changed} {known.get(changed)!r}, not {asked[changed]!r}"
        raise OptimizationError(
            f"{self.path} was begun with {_DIGESTS.get(changed, values)}",
            expected="the source, settings and data that the training was begun with",
            hint=f"give them again, or train anew: rm -r {self.path}",
        )


# What is said of digests, which nobody can read.
_DIGESTS = {
    "data sha256": "other values in the data",
    "eval data sha256": "other values in the evaluation data",
    "module": "a module whose weights have other names or shapes",
}


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a plan's sections, under the names by which they are told."""
    found: dict[str, Any] = {}
    for section, value in plan.items():
        prefix = "" if section in ("config", "about") else f"{section} "
        entries = {f"{prefix}{k}": v for k, v in value.items()} if isinstance(value, dict) else {section: value}
        found |= {name.replace("_", " "): entry for name, entry in entries.items()}
    return found


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
