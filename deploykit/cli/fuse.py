"""`deploykit fuse`."""

from __future__ import annotations

from typing import Any

import click

from deploykit.cli import common
from deploykit.cli.quantize_options import speed_options


@click.command()
@common.model_option
@common.output_option
@click.option(
    "--passes", type=click.Choice(["auto", "onnxscript", "transformers"]), default="auto", show_default=True,
    help="onnxscript: within ONNX's operators; transformers: attention and more as operators of ONNX Runtime.",
)  # fmt: skip
@click.option(
    "--timeout", "timeout_s", type=common.seconds, metavar="SECONDS", default=300.0, show_default=True,
    help="Seconds for one tool.",
)  # fmt: skip
@common.data_option("Real inputs for the comparison with the parent:")
@common.dim_option
@speed_options
@common.contract_option
@common.json_option
@common.dry_run_option
def command(
    model: str,
    output: str,
    passes: str,
    timeout_s: float,
    data: str | None,
    dims: tuple[str, ...],
    contract: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
    **speed: Any,
) -> None:
    """Replace groups of nodes by fewer that do the same, where that is faster; compared with the parent."""
    sizes = common.parse_dims(dims)
    asked: dict[str, Any] = {
        "passes": passes, "timeout_s": timeout_s, "data": data, "dims": sizes, "contract": list(contract),
        **speed, "devices": list(speed["devices"]),
    }  # fmt: skip
    if dry_run:
        common.show_recipe("fuse", {"model": model, **asked})
        return
    from deploykit.pipeline import fuse

    artifact = fuse(model, output, progress=common.progress(), **asked)
    if not as_json:
        params = artifact.manifest.lineage[-1].params
        found: Any = params.get("fused", {})
        fused = ", ".join(f"{count} {op}" for op, count in found.items())
        told = f"{params['tool']}: {params['nodes_before']} nodes -> {params['nodes_after']}"
        click.echo(f"{told} ({fused})" if fused else told)
    common.show_artifact(artifact, as_json=as_json)
