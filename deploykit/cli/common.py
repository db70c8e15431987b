"""Options that mean the same in every command, and how results are shown."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from deploykit.errors import DataError

_FORMS = "FILE.npz, DIR.zarr, a directory of .npy, or module:function."

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

model_option: Decorator = click.option(
    "-m", "--model", required=True, metavar="MODEL", help="Artifact directory, or a model file."
)
output_option: Decorator = click.option(
    "-o", "--output", required=True, metavar="DIR", help="Where the artifact will stand; must not exist."
)
device_option: Decorator = click.option(
    "--device", "devices", multiple=True, metavar="DEVICE",
    help="ort:cpu, ort:cuda, ort:tensorrt, ort:openvino, openvino:cpu, openvino:gpu, or a provider's full name; "
    "torch:cpu, torch-compile:cpu, torch:cuda for .pt2 programs. Repeatable. "
    "Default: the CPU of every installed runtime.",
)  # fmt: skip
dim_option: Decorator = click.option(
    "--dim",
    "dims",
    multiple=True,
    metavar="NAME=SIZE",
    help="Size of a dynamic dimension for made-up inputs. Repeatable.",
)
contract_option: Decorator = click.option(
    "--for", "contract", multiple=True, metavar="TARGET",
    help="A runtime that has to be able to run it: triton:24.08, ort:1.18, openvino:2024.6. Repeatable.",
)  # fmt: skip
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
html_option: Decorator = click.option(
    "--html", metavar="FILE", help="Write the report as one HTML page that needs no network; must not exist."
)
markdown_option: Decorator = click.option(
    "--markdown", metavar="FILE", help="Write it as Markdown, - for standard output; must not exist."
)
dry_run_option: Decorator = click.option(
    "--dry-run", is_flag=True, help="Print the recipe that this amounts to, and stop."
)


def seconds(text: str | float) -> float:
    """Read a time, which is positive and ends: "90", "90s", "1.5m", "1h", "30d".

    Raises:
        click.BadParameter: It is not.
    """
    text = str(text)  # defaults come as numbers
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}.get(text[-1:].lower())
    try:
        found = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise click.BadParameter(f"{text!r} is not a positive number of seconds (90, 90s, 1.5m).")
    return found


def size_bytes(text: str) -> int:
    """Read a size: "2GB", "500 MB", "1.5GiB", or bytes.

    Raises:
        click.BadParameter: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip().lower(), re.ASCII)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size (2GB, 500MB, 1.5GiB).")
    power = " kmgt".index(match[2]) if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def data_option(text: str, *, required: bool = False) -> Decorator:
    """`--data`, with the command's own help."""
    return click.option("--data", required=required, metavar="DATA", help=f"{text} {_FORMS}")


def eval_option(text: str) -> Decorator:
    """`--eval`, with the command's own help."""
    return click.option("--eval", "eval_data", metavar="DATA", help=f"{text} {_FORMS}")


def parse_dims(texts: Sequence[str]) -> dict[str, int]:
    """Read `--dim NAME=SIZE`.

    Raises:
        DataError: Not of the form.
    """
    sizes = {}
    for text in texts:
        name, sep, size = text.partition("=")
        if not sep or not name or not (size.isascii() and size.isdecimal()) or int(size) < 1:
            raise DataError(f"cannot read --dim {text!r}", expected="NAME=SIZE, like sequence=128")
        sizes[name] = int(size)
    return sizes


def progress() -> Any:
    """Progress on standard error."""
    from deploykit.progress import TerminalProgress

    return TerminalProgress()


def show_recipe(step: str, params: dict[str, Any]) -> None:
    """Print the recipe that a command amounts to."""
    from deploykit.recipe import dump

    click.echo(dump({step: {k: v for k, v in params.items() if v not in (None, (), [], {})}}), nl=False)


def show_json(value: Any) -> None:
    """Print JSON."""
    click.echo(json.dumps(value, indent=1))


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; as wide as it is in a pipe, as wide as the terminal otherwise."""
    import io

    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for row in rows:
        made.add_row(*row)
    width = Console().width if sys.stdout.isatty() else 400
    drawn = io.StringIO()
    Console(file=drawn, width=width, highlight=False, markup=False, emoji=False).print(made)
    for line in drawn.getvalue().splitlines():
        if line.strip():
            click.echo(line.rstrip())


def artifact_record(artifact: Any) -> dict[str, Any]:
    """An artifact as JSON."""
    return {
        "artifact": str(artifact.path),
        "sha256": artifact.digest,
        "manifest": json.loads(artifact.manifest.model_dump_json()),
    }


def show_artifact(artifact: Any, *, as_json: bool) -> None:
    """Say what was made, and on what grounds it is believed to be right."""
    manifest = artifact.manifest
    if as_json:
        show_json(artifact_record(artifact))
        return
    click.echo(f"{artifact.path}: {manifest.model}, {artifact.size_bytes / 1e6:.2f} MB")
    for spec in artifact.signature.inputs:
        click.echo(f"  input   {spec}")
    for spec in artifact.signature.outputs:
        click.echo(f"  output  {spec}")
    for record in manifest.evidence.parity:
        click.echo(f"  parity  {parity_line(record)}")
    for title, text in evidence_lines(json.loads(manifest.evidence.model_dump_json())):
        click.echo(f"  {title:7} {text}")


def evidence_lines(evidence: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured of a quantized model: accuracy, layers that run in int8, speed; a title and a line each."""
    lines = [("quality", record["summary"]) for record in evidence["accuracy"]]
    for title, kind in (("int8", "placement"), ("speed", "benchmark")):
        lines += [(title, f"{record['device']} {record['summary']}") for record in evidence[kind]]
    return lines


def parity_line(record: dict[str, Any]) -> str:
    """One line about one comparison."""
    outputs = record.get("outputs") or []
    cosines = [o["cosine"] for o in outputs if o["cosine"] is not None]
    errors = [o["max_abs"] for o in outputs if o["max_abs"] is not None]
    part = f"{record['part']} " if record.get("part") else ""
    text = f"{part}{record['verdict']} on {record['device']}"
    if outputs:
        text += f": {record['cases']} cases ({record.get('data', 'golden')})"
    if cosines:
        text += f", cosine >= {min(cosines):.7f}"
    if errors:
        text += f", max abs {max(errors):.2e}"
    if record.get("top1_agreement") is not None:
        text += f", top-1 agreement {record['top1_agreement']:.2%}"
    return f"{text} ({record['reason']})" if record.get("reason") else text
