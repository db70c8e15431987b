"""What is tried: exports, graph optimizations and schemes, each as the recipe's step that makes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact
from deploykit.comparing import MIN_COSINE
from deploykit.schemes import SCHEMES, choose_schemes
from deploykit.search.state import Variant
from deploykit.search.wish import Wish

EXPORT, SIMPLIFY = "export", "simplify"
# The most promising first: what the budget does not reach is the last of them.
_ORDER = ("static", "dynamic", "static-auto", "fp16", "weights8", "static-nncf", "weights4", "bf16")
_OTHER_WAY = {"torch.export": "torchscript", "torchscript": "torch.export"}
_GRAPH_OPTIONS = ("contract", "dims")


def first_variant(wish: Wish) -> Variant:
    """The export, or the artifact that was given."""
    if wish.model is not None:
        return Variant(EXPORT, "the model as it was given", None, None, path=Path(wish.model))
    table = {"step": "export", "source": wish.source, **wish.export, "contract": list(wish.contract)}
    return Variant(EXPORT, "the model as it was exported", None, table | {"dims": dict(wish.dims)})


def other_export(wish: Wish, first: Variant, made: Artifact) -> Variant | None:
    """The same source by PyTorch's other exporter, where there is one to choose."""
    used = str(made.manifest.lineage[-1].params.get("exporter", ""))
    other = next((there for here, there in _OTHER_WAY.items() if used.startswith(here)), None)
    if first.table is None or other is None or wish.export.get("exporter", "auto") != "auto":
        return None
    return Variant(f"{EXPORT}-{other}", f"exported by {other}", None, {**first.table, "exporter": other})


def graph_variants(wish: Wish, parent: Variant) -> list[Variant]:
    """The same numbers from another graph."""
    shared = _shared(wish)
    found = [Variant(SIMPLIFY, "simplified", parent.name, {"step": "simplify", **shared})]
    return found


def fused_variants(wish: Wish, parent: Variant) -> list[Variant]:
    """Fusions that runtimes do not find by themselves."""
    given = {"step": "fuse", "allow_slower": True, "gate_seconds": 0.0, **_shared(wish)}
    return [
        Variant("fuse-transformers", "with onnxruntime's fusions for transformers", parent.name,
                {**given, "passes": "transformers"}),
        Variant("fuse-onnxscript", "rewritten by onnxscript", parent.name, {**given, "passes": "onnxscript"}),
    ]  # fmt: skip


def scheme_variants(wish: Wish, parent: Variant) -> tuple[list[Variant], dict[str, str]]:
    """The same model in fewer bits; and schemes that are left out, with the reason."""
    names, left = choose_schemes(wish.schemes, data=wish.data)
    if not wish.schemes:
        names = sorted(names, key=lambda n: _ORDER.index(n) if n in _ORDER else len(_ORDER))
    return [Variant(n, SCHEMES[n].about, parent.name, _scheme_table(wish, n)) for n in names], left


def mended(wish: Wish, missed: Variant) -> Variant:
    """A scheme that missed the target, with what keeps more: better settings, then layers in float."""
    assert missed.table is not None
    goal = wish.goal
    drop = f"{100 * goal.drop:g}%" if goal.relative else goal.drop
    asked: dict[str, Any] = {"metric": goal.metric, "max_drop": drop} if goal.metric else {}
    asked |= {"min_sqnr": goal.min_sqnr_db, "min_agreement": goal.min_agreement, "output_name": goal.output}
    table = {**missed.table, **{k: v for k, v in asked.items() if v is not None}}
    return Variant(f"{missed.name}-mixed", f"{missed.about}, mended until it keeps the target", missed.parent, table)


def timed(static: Variant) -> Variant:
    """A static scheme in which layers that int8 slows down stay in float."""
    assert static.table is not None
    table = {k: v for k, v in static.table.items() if k != "gate_seconds"}
    return Variant(f"{static.name}-timed", f"{static.about}; layers that it slows down in float", static.parent, table)


def _shared(wish: Wish) -> dict[str, Any]:
    return {"contract": list(wish.contract), "dims": dict(wish.dims)}


def _scheme_table(wish: Wish, name: str) -> dict[str, Any]:
    scheme = SCHEMES[name]
    table: dict[str, Any] = {
        **scheme.table, "contract": list(wish.contract), "allow_slower": True, "gate_seconds": 0.0,
        "devices": list(wish.devices), "check_rows": 0,  # the search judges all of them itself
    }  # fmt: skip
    if wish.min_cosine != MIN_COSINE:  # else the step's own, which is stricter for halves
        table["min_cosine"] = wish.min_cosine
    if not scheme.calibrated:
        table["dims"] = dict(wish.dims)
    return table


def steps_to(name: str, variants: Sequence[Variant]) -> list[Variant]:
    """A variant's ancestors, the first one first, and itself."""
    by_name = {v.name: v for v in variants}
    found: list[Variant] = []
    here: str | None = name
    while here is not None:
        found.append(by_name[here])
        here = by_name[here].parent
    return found[::-1]
