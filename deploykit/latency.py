"""How long a torch module takes once it is exported, in turns with the module that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.benchmarks import Candidate, Settings
from deploykit.benchmarks.trials import in_turns
from deploykit.data import Dataset
from deploykit.errors import BenchmarkError, DeploykitError, ExportError
from deploykit.exporters.pytorch import TorchSource
from deploykit.gating import SMALLEST_MS, quick_ms, time_pair
from deploykit.modelfile import model_bytes
from deploykit.models import LoadedModel, benchmark_feeds, load_model
from deploykit.progress import Progress, quiet
from deploykit.runtimes import Device, open_session

if TYPE_CHECKING:
    from deploykit.exporters import Way

_ROUNDS = 3
_WARMUP_SHARE = 0.25
# The reference, once more the reference, and the candidate.
_RUNS = 3


class Stopwatch:
    """Times modules that have the inputs and outputs of a source's.

    Args:
        source: Its module as it is now is what the others are compared with.
        folder: For files, which its owner removes.
        log: Takes what frameworks print.
        data: Real inputs; made up by default.
        told: Steps and notes.
    """

    def __init__(self, source: TorchSource, folder: Path, log: Path, data: Dataset | None, told: Progress) -> None:
        self._source, self._folder, self._log = source, folder, log
        with told.step("export the module as it is"):
            self._way, path = self._export_original()
        loaded = load_model(path)
        sizes = {name: size for name, size in source.cases[0].sizes.items() if name in loaded.signature.symbols}
        self.original: LoadedModel = replace(loaded, ranges=source.ranges, sizes=sizes)
        self.feeds, self.origin, _ = benchmark_feeds(self.original, data, 1, {})
        self._base_ms = 0.0
        self._device: Device | None = None
        self._seconds = 0.0
        self._absolute = False

    def _export_original(self) -> tuple[Way, Path]:
        """Write the source's module by the first way that leads to ONNX."""
        target = self._folder / "original.onnx"
        ways = [way for way in self._source.ways if not way.attention]
        for number, way in enumerate(ways):
            try:
                with quiet(self._log):
                    self._source.draft(self._source.module, way, target)
            except ExportError:
                if number == len(ways) - 1:
                    raise
                continue
            return way, target
        raise ExportError(f"no way leads from {self._source.label} to ONNX")

    def begin(self, device: Device, seconds: float, *, absolute: bool) -> float:
        """Time the module as it was.

        Args:
            device: Where everything is timed from now on.
            seconds: Timed seconds of one careful measurement.
            absolute: Whether milliseconds count as they are measured; else by the ratio to the module as it was, which
                is what a busy machine disturbs least.

        Returns:
            Milliseconds a request.

        Raises:
            BenchmarkError: It is over too soon to be timed, or does not run.
        """
        quickest = quick_ms(self.original.path, device, self.feeds)
        if quickest < SMALLEST_MS:
            raise BenchmarkError(
                f"too small to be timed: the module runs in {quickest:.3f} ms, less than {SMALLEST_MS:g} ms",
                hint="ask for a share of the channels: --ratio 0.5",
            )
        self._device, self._seconds, self._absolute = device, seconds, absolute
        self._base_ms = float(self._pair(self.original.path)["parent_ms"])
        return self._base_ms

    def measure(self, module: Any) -> float:
        """Milliseconds of a module, from a few turns in this process; for choices on the way."""
        path = self._draft(module)
        feed = self.feeds[0]
        assert self._device is not None
        with open_session(self.original.path, self._device) as old, open_session(path, self._device) as new:
            trial = in_turns(lambda: old.run(feed), lambda: new.run(feed))
        return self._base_ms / trial.ratio

    def confirm(self, module: Any) -> float:
        """Milliseconds of a module, measured as the result will be: interleaved rounds of fresh processes."""
        found = self._pair(self._draft(module))
        return float(found["ms"]) if self._absolute else self._base_ms / float(found["ratio"])

    def _draft(self, module: Any) -> Path:
        target = self._folder / "trial.onnx"
        for file in self._folder.glob("trial.onnx*"):
            file.unlink()
        try:
            with quiet(self._log):
                self._source.draft(module, self._way, target)
        except DeploykitError as exc:
            raise ExportError(f"the pruned module does not become ONNX ({exc.what})", hint=exc.hint) from exc
        return target

    def _pair(self, path: Path) -> Mapping[str, Any]:
        each = self._seconds / _ROUNDS / _RUNS
        settings = Settings(
            rounds=_ROUNDS, seconds=each * (1 - _WARMUP_SHARE), warmup_s=each * _WARMUP_SHARE, min_cosine=-1.0,
            inputs=self.origin, max_drop=1.0,
        )  # fmt: skip
        first, second = (
            Candidate(name, str(file), str(self._device), self.original.digest, model_bytes(file))
            for name, file in (("original", self.original.path), ("pruned", path))
        )
        return time_pair(first, second, self.feeds, settings)
