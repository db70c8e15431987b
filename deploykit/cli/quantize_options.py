"""Options of `deploykit quantize` that say what a quantized model has to keep, and how fast it has to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from deploykit.cli import common

exclude_option: common.Decorator = click.option(
    "--exclude",
    multiple=True,
    metavar="NODE",
    help="A node's name or an operator type that stays in floating point. Repeatable.",
)
_METRICS = ("accuracy", "f1", "precision", "recall")


class _Metric(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2
    """One of ours, or of a plugin; those are looked up only where the name is not ours.

    Args:
        further: Names that stand for something else.
    """

    def __init__(self, further: tuple[str, ...] = ()) -> None:
        self._known = (*_METRICS, *further)
        self.name = "|".join((*self._known, "NAME"))

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Take it over; anything unknown is wrong usage."""
        name = str(value)
        if name not in self._known:
            from deploykit.plugins import find, names

            if find("metrics", name) is None:
                self.fail(f"{name!r} is not one of {', '.join((*self._known, *names('metrics')))}.", param, ctx)
        return name


def metric_option(text: str, *, default: str | None = None, further: tuple[str, ...] = ()) -> common.Decorator:
    """`--metric`, with the command's own help."""
    kind = _Metric(further)
    return click.option(
        "--metric", type=kind, default=default, show_default=default is not None, metavar=f"[{kind.name}]", help=text
    )


_TARGET_OPTIONS: tuple[common.Decorator, ...] = (
    common.eval_option("Real inputs, with 'labels' for a metric:"),
    metric_option(
        "What may get worse by --max-drop on --eval; NAME: a plugin's. accuracy, where no other target is given."
    ),
    click.option(
        "--max-drop", metavar="DROP", help="0.01: in the metric's units (the default); 1%: of the parent's value."
    ),
    click.option(
        "--min-sqnr", type=float, metavar="DB",
        help="Smallest ratio of signal to error of the output, in dB, on --eval or --data; needs no labels.",
    ),
    click.option(
        "--min-agreement", type=click.FloatRange(0, 1), metavar="SHARE",
        help="Smallest share of samples whose class is the parent's; needs no labels.",
    ),
    click.option("--output-name", metavar="NAME", help="The output that is judged; the first [batch, classes]."),
)  # fmt: skip
_ESCALATION_OPTIONS: tuple[common.Decorator, ...] = (
    click.option(
        "--no-escalation", is_flag=True,
        help="Where a target is missed, leave layers in float at once, without trying other settings before.",
    ),
)  # fmt: skip
_CHECK_OPTIONS: tuple[common.Decorator, ...] = (
    click.option(
        "--check-rows", type=click.IntRange(0), default=256, show_default=True,
        help="Without a target: rows of the real data that the result is compared with its parent on; 0: none.",
    ),
)  # fmt: skip
_SPEED_OPTIONS: tuple[common.Decorator, ...] = (
    common.device_option,
    click.option("--allow-slower", is_flag=True, help="Accept a model that is not faster than its parent."),
    click.option(
        "--gate-seconds", type=click.FloatRange(0), default=6.0, show_default=True,
        help="Timed seconds in all, against the parent on each --device; 0: no timing.",
    ),
)  # fmt: skip


def goal_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for accuracy and speed to a command, which gets them as keyword arguments."""
    return _with(command, *_TARGET_OPTIONS, *_CHECK_OPTIONS, *_ESCALATION_OPTIONS, *_SPEED_OPTIONS)


def plain_goal_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """As `goal_options`, where there are no other settings to try."""
    return _with(command, *_TARGET_OPTIONS, *_CHECK_OPTIONS, *_SPEED_OPTIONS)


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """As `goal_options`, for what only judges."""
    return _with(command, *_TARGET_OPTIONS)


def speed_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """As `goal_options`, for speed alone."""
    return _with(command, *_SPEED_OPTIONS)


def _with(command: Callable[..., Any], *options: common.Decorator) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


def goal_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The options as arguments of the verb and as keys of the recipe."""
    rest = {key: value for key, value in given.items() if key != "no_escalation"}
    further = {"escalate": not given["no_escalation"]} if "no_escalation" in given else {}
    return {**rest, **further, "devices": list(given["devices"])}
