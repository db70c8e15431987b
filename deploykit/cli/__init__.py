"""The command line. Only click is imported for `--help`; each command's module is loaded when it is called."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

import deploykit
from deploykit.errors import DeploykitError, storage_error

_COMMANDS = {
    "doctor": "What is installed, which devices exist, what clashes, and what to do about it.",
    "export": "Turn a model into a verified ONNX artifact.",
    "finetune": "Train a PyTorch model further, and turn it into a verified ONNX artifact.",
    "prune": "Take channels out of a PyTorch model, or set weights to zero; train, export and prove it.",
    "distill": "Train a small student to answer as a large teacher does, and export it.",
    "simplify": "Simplify the graph, compared with its parent.",
    "fuse": "Fuse nodes, where that is right and faster.",
    "preprocess": "Take decoded images, or samples of sound, and prepare them in the graph.",
    "quantize": "Fewer bits for weights, activations or both; sweep and repair.",
    "optimize": "Find the best deployment: export, quantize, tune and measure, under a target and a budget.",
    "apply": "Apply a step of another installed distribution, compared with its parent.",
    "verify": "Compare a model with another, or with its own golden outputs.",
    "inspect": "Show what a model is and costs: operators, MACs, memory, runtimes, contracts.",
    "benchmark": "Measure models on devices, in interleaved rounds.",
    "report": "Show a report again: table, HTML page, Markdown, or the schema of reports.",
    "compare": "Compare two reports; fail where a condition on the change fails.",
    "package": "Write what a serving target takes: Triton, OpenVINO Model Server, KServe, BentoML, MLflow, an image.",
    "smoke": "Ask the golden requests of a bundle, of a server or in process.",
    "serve": "Serve models over HTTP and gRPC, until a signal ends it.",
    "sbom": "Write what an artifact is made of and by, with a model card.",
    "sign": "Sign an artifact with a key of your own.",
    "run": "Run a recipe: the whole chain.",
    "data": "Pack datasets into compressed stores, choose small parts of them, show what is in them.",
    "cache": "List and prune what searches have kept.",
}


class _LazyGroup(click.Group):
    """Knows the commands' names and help without importing their modules."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        found: click.Command = importlib.import_module(f"deploykit.cli.{cmd_name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(deploykit.__version__, prog_name="deploykit")
def cli() -> None:
    """From a trained model to the fastest artifact that is still correct, with the evidence beside it."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 a `DeploykitError`, 2 wrong usage, 130 interrupted.

    `compare` ends with 3 where a condition failed.

    Anything else is a bug of ours and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, _terminate)
    code = 1
    try:
        code = int(
            cli.main(args=list(argv) if argv is not None else None, prog_name="deploykit", standalone_mode=False) or 0
        )
    except DeploykitError as exc:
        click.echo(f"error: {exc}", err=True)
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing half-written is left", err=True)
        code = 130
    except OSError as exc:
        error = storage_error(exc, exc.filename or "the output")
        if error is None:
            raise
        click.echo(f"error: {error}", err=True)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends like Ctrl-C: temporary directories are removed on the way out."""
    raise KeyboardInterrupt
