"""The jobs of a search: what each deed is told, and which files it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploykit.benchmarks import Settings
from deploykit.comparing import MIN_COSINE
from deploykit.search.jobs import Job
from deploykit.search.machines import Node
from deploykit.search.state import Place, Seat, Variant, timed_by_wall
from deploykit.search.wish import Wish

_DEEDS = "deploykit.search.deeds:"
# Wrong beyond doubt, and not worth timing, whatever the target says.
_TIMED_COSINE = 0.9


class Tasks:
    """Makes jobs.

    Args:
        wish: What is asked for.
        variants: By name; filled while the search goes on.
        run: Names the search. What a function gave, be it a model or data, is taken for the same within one search
            only: its code may read whatever it likes.
        node: The machine that judges and measures; None for any.
    """

    def __init__(self, wish: Wish, variants: Mapping[str, Variant], run: str, node: Node | None = None) -> None:
        self._wish = wish
        self._node = node.name if node is not None else None
        self._variants = variants
        self._run = run

    @property
    def judged_on(self) -> str | None:
        """The real data that accuracy is judged on."""
        return self._wish.eval_data or self._wish.data

    def make(self, variant: Variant, *, exclusive: bool = False) -> Job:
        """The step that makes a variant."""
        assert variant.table is not None
        table, inputs, params = dict(variant.table), dict[str, Path](), dict[str, Any]()
        for name, source in (("data", self._wish.data), ("eval_data", self._wish.eval_data)):
            if source is not None and (name == "data" or has_goal(table)):
                files, told = self._given(source, name)
                inputs |= files
                params |= {k: v for k, v in told.items() if k != name}
                table |= {k: v for k, v in told.items() if k == name}
        if variant.state is not None:
            inputs["merge"] = variant.state
        if variant.parent is not None:
            inputs["model"] = self._path(variant.parent)
        elif Path(self._wish.source).exists():
            inputs["source"] = Path(self._wish.source)
        else:
            params["run"] = self._run
        told = {"name": variant.name, "table": table, **params}
        return Job(
            _DEEDS + "make", told, inputs, variant.name, exclusive=exclusive, node=self._node if exclusive else None
        )

    def judge(self, device: str, seats: Sequence[Seat], budget_s: float, stall_s: float, so_far: Path) -> Job:
        """Accuracy and kernels of seats on one device.

        Args:
            device: Its name.
            seats: On that device.
            budget_s: Seconds after which it begins with no more.
            stall_s: Seconds that one of them may take.
            so_far: A file for what was found before it ended, however it did.
        """
        source = self.judged_on
        inputs, params = self._given(source, "data") if source is not None else ({}, {})
        inputs["parent"] = self._path(next(iter(self._variants)))
        for seat in seats:
            inputs[f"model:{seat.place.model}"] = self._path(seat.place.model)
        params |= {
            "device": device,
            "goal": asdict(self._wish.goal),
            "seats": [[s.place.model, s.place.config.precision] for s in seats],
            "placed": sorted({s.place.model for s in seats if self._variants[s.place.model].quantized}),
            "effort": {"budget_s": budget_s, "so_far": str(so_far)},
        }
        return Job(_DEEDS + "judge", params, inputs, f"judge on {device}", stall_s=stall_s, node=self._node)

    def timed(
        self, deed: str, places: Sequence[Place], effort: Mapping[str, Any], *, batch: int | None = None, **params: Any
    ) -> Job:
        """Screening, tuning or the last measurement of places, the reference first, in requests of some samples."""
        source = self._wish.data or self._wish.eval_data
        inputs, told = self._given(source, "data") if source is not None else ({}, {})
        for place in places:
            inputs[f"model:{place.model}"] = self._path(place.model)
        told |= {
            **params,
            "seats": [p.as_params(self._wish.objective) for p in places],
            "settings": self._settings(batch or self._wish.samples),
            "dims": dict(self._wish.dims) if source is None else {},
            "budget": self._wish.budget_s,
            "effort": dict(effort),
        }
        label = f"{deed} {places[0].label}" if len(places) == 1 else f"{deed} {len(places)} candidates"
        return Job(_DEEDS + deed, told, inputs, label, exclusive=True, node=self._node)

    def _settings(self, batch: int) -> dict[str, Any]:
        wish = self._wish
        scenario = "offline" if timed_by_wall(wish.objective) else "latency"
        # Where real data tell how accurate something is, the outputs of one request need not, unless that was asked.
        usual = wish.min_cosine == MIN_COSINE and self.judged_on is not None
        cosine = min(wish.min_cosine, _TIMED_COSINE) if usual else wish.min_cosine
        return asdict(
            Settings(batch=batch, scenario=scenario, seed=wish.seed, max_drop=1.0, min_cosine=cosine, confirm=False)
        )

    def _given(self, source: str, name: str) -> tuple[dict[str, Path], dict[str, Any]]:
        """A dataset as an input of a job, or, where a function gives it, as a parameter of this search only."""
        path = Path(source)
        return ({name: path}, {}) if path.exists() else ({}, {name: source, f"{name}_run": self._run})

    def _path(self, name: str) -> Path:
        path = self._variants[name].path
        assert path is not None
        return path


def has_goal(table: Mapping[str, Any]) -> bool:
    """Whether a step is held to something, so that it needs the data that this is judged on."""
    return any(table.get(key) is not None for key in ("metric", "min_sqnr", "min_agreement"))
