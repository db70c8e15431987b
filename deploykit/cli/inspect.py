"""`deploykit inspect`."""

from __future__ import annotations

import click

from deploykit.cli import common


@click.command()
@click.argument("model")
@common.json_option
def command(model: str, as_json: bool) -> None:
    """Show signature, operators, size, lineage and evidence of an artifact or a model file."""
    from deploykit.describe import describe

    found = describe(model)
    if as_json:
        common.show_json(found)
        return
    opsets = ", ".join(f"{k or 'ai.onnx'} {v}" for k, v in found["opsets"].items())
    click.echo(f"{found['model']}: {found['bytes'] / 1e6:.2f} MB, {found['parameters']:,} parameters, opsets {opsets}")
    for kind in ("inputs", "outputs"):
        for text in found[kind]:
            click.echo(f"  {kind[:-1]:7} {text}")
    ops = ", ".join(f"{op} {count}" for op, count in found["ops"].items())
    click.echo(f"  {found['nodes']} nodes: {ops}")
    for step in found.get("lineage", []):
        click.echo(f"  step    {step['step']} ({step['seconds']} s)")
        for note in step["notes"]:
            click.echo(f"          note: {note}")
    for record in found.get("evidence", {}).get("parity", []):
        click.echo(f"  parity  {common.parity_line(record)}")
