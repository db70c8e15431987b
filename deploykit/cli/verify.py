"""`deploykit verify`."""

from __future__ import annotations

from typing import Any

import click

from deploykit.cli import common


@click.command()
@common.model_option
@click.option(
    "--against", metavar="REFERENCE",
    help="The reference: a model, or its source as `export` takes it; without one, the artifact's own golden outputs.",
)  # fmt: skip
@common.data_option("Real inputs:")
@common.dim_option
@common.device_option
@click.option(
    "--min-cosine", type=click.FloatRange(-1, 1),
    help="Accept other values down to this cosine, as for quantized models; strict equality by default.",
)  # fmt: skip
@click.option(
    "--bisect/--no-bisect", default=True, show_default=True,
    help="Where the outputs differ from --against, name the first node that diverges.",
)  # fmt: skip
@click.option(
    "--report", metavar="DIR",
    help="Save that node as a runnable model, with its inputs and both outputs; must not exist.",
)  # fmt: skip
@click.option("--public-key", metavar="FILE", help="First check the artifact's signature with this key, PEM.")
@click.option("--signature", metavar="FILE", help="The signature; by default MODEL.sig.")
@common.json_option
def command(
    model: str,
    against: str | None,
    data: str | None,
    dims: tuple[str, ...],
    devices: tuple[str, ...],
    min_cosine: float | None,
    bisect: bool,
    report: str | None,
    public_key: str | None,
    signature: str | None,
    as_json: bool,
) -> None:
    """Check a model's files and its outputs; exit code 1 where they are not the reference's."""
    from deploykit.errors import ParityError
    from deploykit.pipeline import check_signature, verify

    if signature is not None and public_key is None:
        raise click.UsageError("--signature without --public-key")
    if public_key is not None:
        check_signature(model, public_key=public_key, signature=signature)
        click.echo(f"signature: {model} is what the owner of {public_key} signed", err=as_json)
    records = verify(
        model, against=against, data=data, devices=devices, dims=common.parse_dims(dims), min_cosine=min_cosine,
        bisect=bisect, report=report, progress=common.progress(),
    )  # fmt: skip
    if as_json:
        common.show_json(records)
    else:
        for record in records:
            _show(record)
    bad = next((r for r in records if r["verdict"] not in ("passed", "not run")), None)
    if bad is not None:
        raise ParityError(
            f"{model} is not verified: {bad['verdict']} on {bad['device']}",
            hint="give --min-cosine for a quantized model"
            if min_cosine is None and bad["verdict"] == "failed"
            else None,
        )


def _show(record: dict[str, Any]) -> None:
    """One comparison: a line, a table of the outputs, and what the bisection found."""
    click.echo(common.parity_line(record))
    rows = [
        [
            output["name"],
            "equal" if output["equal"] else "DIFFERS",
            _number(output["max_abs"], "{:.2e}"),
            _number(output["max_rel"], "{:.2e}"),
            _number(output["cosine"], "{:.7f}"),
            _sqnr(output),
            _number(output.get("top1_agreement"), "{:.2%}"),
        ]
        for output in record.get("outputs") or []
    ]
    if rows:
        common.show_table(["output", "", "max abs", "max rel", "cosine", "SQNR dB", "top-1"], rows)
    for text in record.get("relaxed", ()):
        click.echo(f"relaxed: {text}")
    found = record.get("bisection")
    if found:
        _show_finding(found)
    if record.get("report"):
        click.echo(f"saved: {record['report']} (replay it: python {record['report']}/replay.py)")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _sqnr(output: dict[str, Any]) -> str:
    if output["sqnr_db"] is not None:
        return f"{output['sqnr_db']:.1f}"
    return "inf" if output["max_abs"] == 0 else ""


def _show_finding(found: dict[str, Any]) -> None:
    nodes = f" (of {found['nodes']} nodes, {found.get('seconds', 0):.1f} s)" if found.get("nodes") else ""
    click.echo(f"bisection: {found['summary']}{nodes}")
    for cause in (*found.get("causes", ()), *found.get("notes", ())):
        click.echo(f"  {cause}")
    if found.get("agreeing"):
        click.echo(f"  the last tensors that agree: {', '.join(found['agreeing'])}")
    if found.get("alternatives"):
        click.echo(f"  diverging on their own, too: {', '.join(found['alternatives'])}")
    layers = found.get("layers") or []
    if layers:
        rows = [
            [r["node"], r["op"], _number(r["sqnr_db"], "{:.1f}"), _number(r["input_sqnr_db"], "{:.1f}")] for r in layers
        ]
        common.show_table(["worst layers", "operator", "SQNR dB", "of its inputs"], rows)
