"""The folder of a pruning that trains, beside its output, from which it goes on after an interrupt.

    OUTPUT.training/
    ├── pruning.json   what was asked for, and what the weights were, by which `resume` knows the pruning again
    ├── step-N.pt      what step N took out: structure or masks, weights, and what was found on the way
    └── recovery-N/    the training after it; see `optimizers.training.folder`

Of the steps that are over, only the last one is kept. The folder goes when the artifact stands.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.errors import OptimizationError, OutputExistsError, first_line, storage_error
from deploykit.extras import require
from deploykit.optimizers.training.folder import load_tensors, save_tensors
from deploykit.progress import Progress
from deploykit.staging import check_writable, write_file

_PLAN = "pruning.json"


class PruneFolder:
    """Steps of one pruning.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, *, resume: bool) -> None:
        """See that a pruning may begin here, or go on.

        Raises:
            OutputExistsError: One is there, and `resume` is not given; or something that is not ours.
        """
        ours = (self.path / _PLAN).is_file()
        if ours and not resume and self._last():
            raise OutputExistsError(
                f"{self.path} holds an earlier pruning for this output",
                hint=f"go on with it: --resume (resume=True); or remove it: rm -r {self.path}",
            )
        if self.path.exists() and not ours:
            raise OutputExistsError(f"{self.path} exists and is no pruning", hint="choose another -o, or remove it")

    def begin(self, plan: Mapping[str, Any], module: Any) -> dict[str, Any] | None:
        """Begin, or find out that the pruning that is here is this one.

        Args:
            plan: What is asked for.
            module: As it is before; its weights are known again too, because a factory may draw new ones.

        Returns:
            What the last step kept; None where there is none.

        Raises:
            OptimizationError: Another pruning is here.
            StorageError: The folder cannot be written.
        """
        asked = json.loads(json.dumps({**_flat(plan), "weights": _digest(module)}))
        number = self._last()
        if number:
            self._compare(asked)
            return {"step": number, **load_tensors(self._file(number))}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise storage_error(exc, self.path) or exc from exc
        check_writable(self.path)
        write_file(self.path / _PLAN, (json.dumps(asked, indent=1) + "\n").encode(), replace=True)
        return None

    def keep(self, step: int, state: Mapping[str, Any]) -> None:
        """Keep what a step took out; those before it go, with their trainings."""
        save_tensors(dict(state), self._file(step))
        for number in range(1, step):
            self._file(number).unlink(missing_ok=True)
            shutil.rmtree(self.recovery(number), ignore_errors=True)

    def recovery(self, step: int) -> Path:
        """Where the training after a step stands."""
        return self.path / f"recovery-{step}"

    def leave(self, told: Progress) -> None:
        """Say how to go on from an error or an interrupt; remove a folder from which nothing can."""
        if self._last():
            told.note(f"what was pruned and trained is kept in {self.path}: --resume (resume=True) goes on with it")
        elif (self.path / _PLAN).is_file():
            (self.path / _PLAN).unlink()
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def discard(self) -> None:
        """Remove all of it, once the artifact stands."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, step: int) -> Path:
        return self.path / f"step-{step}.pt"

    def _last(self) -> int:
        """The number of the last step that was kept; 0 for none."""
        names = [file.stem.removeprefix("step-") for file in self.path.glob("step-*.pt")]
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def _compare(self, asked: Mapping[str, Any]) -> None:
        file = self.path / _PLAN
        try:
            known = json.loads(file.read_bytes())
            changed = [name for name in asked if known.get(name) != asked[name]]
        except (OSError, ValueError, AttributeError) as exc:
            raise OptimizationError(
                f"{self.path} is no pruning to go on with ({first_line(exc)})", hint=f"remove it: rm -r {self.path}"
            ) from exc
        if changed:
            name = changed[0]
            what = f"{name.replace('_', ' ')} {known.get(name)!r}, not {asked[name]!r}"
            raise OptimizationError(
                f"{self.path} was begun with {'other weights' if name == 'weights' else what}",
                expected="the source and the settings that the pruning was begun with",
                hint=f"give them again, or begin anew: rm -r {self.path}",
            )


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training by names of their own, so that an error can name the one that is another."""
    found: dict[str, Any] = {}
    for name, value in plan.items():
        found |= {f"{name} {key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def _digest(module: Any) -> str:
    """sha256 over a module's weights and buffers."""
    torch, total = require("torch", extra="prune"), hashlib.sha256()
    for named in (module.named_parameters(), module.named_buffers()):
        for name, tensor in named:
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
