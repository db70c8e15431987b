"""The schemes that `quantize sweep` tries: a name, and what makes the artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact
from deploykit.errors import OptimizationError
from deploykit.extras import available
from deploykit.optimizers import DynamicConfig, HalfConfig, StaticConfig, WeightsConfig
from deploykit.quantizing import quantize_dynamic, quantize_static
from deploykit.storing import quantize_half, quantize_weights

Verb = Callable[..., Artifact]
_VERBS: Mapping[str, tuple[Callable[..., Artifact], Callable[..., Any]]] = {
    "quantize-half": (quantize_half, HalfConfig),
    "quantize-weights": (quantize_weights, WeightsConfig),
    "quantize-dynamic": (quantize_dynamic, DynamicConfig),
    "quantize-static": (quantize_static, StaticConfig),
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to make a model smaller or faster.

    Attributes:
        table: What a recipe's step says; what it does not say is the verb's default.
        calibrated: Whether it needs calibration data.
        usual: Whether it is tried where nobody chose; the others take minutes, or help few models.
        about: What it is, in a few words.
    """

    table: Mapping[str, Any]
    calibrated: bool
    usual: bool
    about: str

    @property
    def verb(self) -> Verb:
        """Makes the artifact from a model and a place; further arguments by name."""
        verb, config = _VERBS[self.table["step"]]
        return partial(verb, config=config(**{k: v for k, v in self.table.items() if k != "step"}))


def _half(precision: str) -> dict[str, Any]:
    return {"step": "quantize-half", "precision": precision}


def _weights(bits: int) -> dict[str, Any]:
    return {"step": "quantize-weights", "bits": bits}


def _static(**fields: Any) -> dict[str, Any]:
    return {"step": "quantize-static", **fields}


SCHEMES: Mapping[str, Scheme] = {
    "fp16": Scheme(_half("fp16"), False, True, "weights in float16"),
    "bf16": Scheme(_half("bf16"), False, False, "weights in bfloat16"),
    "weights8": Scheme(_weights(8), False, True, "weights in blocks of 8 bits"),
    "weights4": Scheme(_weights(4), False, True, "weights in blocks of 4 bits"),
    "dynamic": Scheme({"step": "quantize-dynamic"}, False, True, "int8, ranges at run time"),
    "static": Scheme(_static(), True, True, "int8, ranges from data"),
    "static-auto": Scheme(_static(calibration="auto"), True, True, "the same, ranges clipped where that is better"),
    "static-nncf": Scheme(_static(engine="nncf"), True, available("nncf"), "static, by NNCF and repaired"),
    "static-equalize": Scheme(
        _static(equalize=True, bias_correction="fast"), True, False, "static, with equalized convolutions"
    ),
    "static-full": Scheme(_static(bias_correction="full"), True, False, "static, with full bias correction"),
    "static-adaround": Scheme(_static(rounding="adaround"), True, False, "static, with learnt rounding"),
}


def choose_schemes(names: Sequence[str], *, data: str | Path | None) -> tuple[list[str], dict[str, str]]:
    """The schemes to try, and why others are left out.

    Args:
        names: What the user asked for; none for the usual ones.
        data: Calibration data.

    Raises:
        OptimizationError: There is no such scheme, or one that was asked for needs data.
    """
    unknown = next((n for n in names if n not in SCHEMES), None)
    if unknown is not None:
        raise OptimizationError(f"unknown scheme {unknown!r}", expected=", ".join(SCHEMES))
    chosen, left = [], {}
    for name in dict.fromkeys(names or (n for n, s in SCHEMES.items() if s.usual)):
        if SCHEMES[name].calibrated and data is None:
            if names:
                raise OptimizationError(f"{name} needs calibration data", hint="add --data FILE")
            left[name] = "needs calibration data: --data FILE"
        else:
            chosen.append(name)
    return chosen, left
