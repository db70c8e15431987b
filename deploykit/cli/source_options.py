"""Options of commands that take a source: how it is loaded, and what its graph has to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from deploykit.cli import common

_OPTIONS: tuple[common.Decorator, ...] = (
    click.option(
        "--dynamic", multiple=True, metavar="SPEC",
        help="'batch' (default: the first axis of every input), 'none', or INPUT:AXIS=NAME,AXIS=NAME. Repeatable.",
    ),
    click.option(
        "--input", "inputs", multiple=True, metavar="SPEC",
        help="NAME=DTYPE[DIM,...][:LOW..HIGH], for a factory without example inputs: "
        "'x=float32[batch,3,224,224]'. Repeatable.",
    ),
    common.dim_option,
    click.option("--opset", type=int, help="ONNX opset; 18, or what --for allows, by default."),
    click.option(
        "--task", metavar="TASK",
        help="What a Hugging Face model is for, such as text-classification; inferred from its config by default.",
    ),
    common.contract_option,
)  # fmt: skip
_NAMES = ("dynamic", "inputs", "dims", "opset", "task", "contract")
part_option: common.Decorator = click.option(
    "--part", metavar="PART",
    help="One graph of a model that becomes several: encoder or decoder, text or image. "
    "All of them by default, where a command makes several.",
)  # fmt: skip


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add them to a command, which gets them as keyword arguments."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def source_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Those among a command's arguments, which are taken out of there, as keys of a recipe and arguments of a verb.

    Raises:
        DataError: A size of a dimension cannot be read.
    """
    found = {name: given.pop(name) for name in _NAMES}
    lists = {name: list(found[name]) for name in ("dynamic", "inputs", "contract")}
    return {**found, **lists, "dims": common.parse_dims(found["dims"])}
