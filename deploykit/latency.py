"""How long a torch module takes once it is exported, in turns with the module that it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.benchmarks.trials import in_turns
from deploykit.contract import conform
from deploykit.data import Dataset
from deploykit.errors import BenchmarkError, ContractError, DeploykitError, ExportError
from deploykit.exporters.pytorch import TorchSource
from deploykit.gating import SMALLEST_MS, Gate, quick_ms, time_on
from deploykit.models import LoadedModel, benchmark_feeds, load_model
from deploykit.progress import Progress, quiet
from deploykit.runtimes import open_session
from deploykit.targets import Target

if TYPE_CHECKING:
    from deploykit.exporters import Way


class Stopwatch:
    """Times modules that have the inputs and outputs of a source's.

    Args:
        source: Its module as it is now is what the others are compared with.
        folder: For files, which its owner removes.
        log: Takes what frameworks print.
        data: Real inputs; made up by default.
        told: Steps and notes.
        held: Contracts that the result is written for: what is timed is written for them too.
    """

    def __init__(
        self,
        source: TorchSource,
        folder: Path,
        log: Path,
        data: Dataset | None,
        told: Progress,
        held: Sequence[Target] = (),
    ) -> None:
        self._source, self._folder, self._log, self._held = source, folder, log, held
        with told.step("export the module as it is"):
            self._way, path = self._export_original()
        loaded = load_model(path)
        sizes = {name: size for name, size in source.cases[0].sizes.items() if name in loaded.signature.symbols}
        self.original: LoadedModel = replace(loaded, ranges=source.ranges, sizes=sizes)
        self.feeds, self.origin, _ = benchmark_feeds(self.original, data, 1, {})
        self._base_ms = 0.0
        self._gate: Gate | None = None
        self._absolute = False

    def _export_original(self) -> tuple[Way, Path]:
        """Write the source's module by the first way that leads to ONNX."""
        target = self._folder / "original.onnx"
        ways = [way for way in self._source.ways if not way.attention]
        for number, way in enumerate(ways):
            try:
                self._write(self._source.module, way, target)
            except (ExportError, ContractError):
                if number == len(ways) - 1:
                    raise
                continue
            return way, target
        raise ExportError(f"no way leads from {self._source.label} to ONNX")

    def _write(self, module: Any, way: Way, target: Path) -> None:
        with quiet(self._log):
            self._source.draft(module, way, target)
            conform(target, self._held)

    def begin(self, gate: Gate, *, absolute: bool) -> float:
        """Time the module as it was.

        Args:
            gate: How the result will be timed; on the first of its devices, everything is from now on.
            absolute: Whether milliseconds count as they are measured; else by the ratio to the module as it was, which
                is what a busy machine disturbs least.

        Returns:
            Milliseconds a request.

        Raises:
            BenchmarkError: It is over too soon to be timed, or does not run.
        """
        quickest = quick_ms(self.original.path, gate.devices[0], self.feeds)
        if quickest < SMALLEST_MS:
            raise BenchmarkError(
                f"too small to be timed: the module runs in {quickest:.3f} ms, less than {SMALLEST_MS:g} ms",
                hint="ask for a share of the channels: --ratio 0.5",
            )
        self._gate, self._absolute = gate, absolute
        self._base_ms = float(self._pair(self.original.path)["parent_ms"])
        return self._base_ms

    def measure(self, module: Any) -> float:
        """Milliseconds of a module, from a few turns in this process; for choices on the way."""
        path = self._draft(module)
        feed, device = self.feeds[0], self._asked.devices[0]
        with open_session(self.original.path, device) as old, open_session(path, device) as new:
            trial = in_turns(lambda: old.run(feed), lambda: new.run(feed))
        return self._base_ms / trial.ratio

    def confirm(self, module: Any) -> float:
        """Milliseconds of a module, by the very measurement that the result has to pass."""
        found = self._pair(self._draft(module))
        return float(found["ms"]) if self._absolute else self._base_ms / float(found["ratio"])

    def _draft(self, module: Any) -> Path:
        target = self._folder / "trial.onnx"
        for file in self._folder.glob("trial.onnx*"):
            file.unlink()
        try:
            self._write(module, self._way, target)
        except DeploykitError as exc:
            raise ExportError(f"the pruned module does not become ONNX ({exc.what})", hint=exc.hint) from exc
        return target

    @property
    def _asked(self) -> Gate:
        if self._gate is None:
            raise RuntimeError("begin was not called")
        return self._gate

    def _pair(self, path: Path) -> Mapping[str, Any]:
        gate = self._asked
        record = time_on(gate.devices[0], self.original, path, gate, self.feeds, self.origin)
        if "ratio" not in record:
            raise BenchmarkError(f"the module cannot be timed: {record['device']} {record['summary']}")
        return record
