"""`deploykit export`."""

from __future__ import annotations

from typing import Any

import click

from deploykit.cli import common
from deploykit.cli.source_options import part_option, source_options, source_settings


@click.command()
@click.argument("source")
@common.output_option
@source_options
@part_option
@click.option(
    "--exporter", type=click.Choice(["auto", "torch.export", "torchscript"]), default="auto", show_default=True,
    help="How PyTorch becomes ONNX; auto tries torch.export first and says why where it falls back.",
)  # fmt: skip
@click.option(
    "--timeout", "timeout_s", type=common.seconds, metavar="SECONDS",
    help="CPU seconds that one way to ONNX may take; by default 40 and more for large modules, and five times that "
    "where no other way is left.",
)  # fmt: skip
@common.data_option("Real inputs for the parity check:")
@common.device_option
@click.option("--allow-unverified", is_flag=True, help="Keep a model whose outputs do not react to its inputs.")
@common.json_option
@common.dry_run_option
def command(
    source: str,
    output: str,
    part: str | None,
    exporter: str,
    timeout_s: float | None,
    data: str | None,
    devices: tuple[str, ...],
    allow_unverified: bool,
    as_json: bool,
    dry_run: bool,
    **given: Any,
) -> None:
    """Turn a model into a verified ONNX artifact.

    SOURCE is file.py:factory, package.module:factory, a .pt2, .keras, .tflite, .skops or .onnx file, a Hugging Face
    model directory, or a SavedModel directory (DIR or DIR:signature). A factory returns a PyTorch module, a Keras model
    or a scikit-learn estimator. The result is run beside the source at several shapes; where the numbers differ,
    nothing is written.

    A model that becomes several graphs (an encoder and a decoder with its key-value cache, the towers of CLIP) gives
    one artifact each: DIR/encoder, DIR/decoder.
    """
    shared: dict[str, Any] = {
        **source_settings(given), "exporter": exporter, "timeout_s": timeout_s, "part": part, "data": data,
        "devices": list(devices),
    }  # fmt: skip
    if dry_run:
        common.show_recipe("export", {"source": source, **shared, "allow_unverified": allow_unverified or None})
        return
    from deploykit.pipeline import export_parts

    made = export_parts(source, output, allow_unverified=allow_unverified, progress=common.progress(), **shared)
    if "" in made or part is not None:
        common.show_artifact(next(iter(made.values())), as_json=as_json)
    elif as_json:
        common.show_json({name: common.artifact_record(artifact) for name, artifact in made.items()})
    else:
        for artifact in made.values():
            common.show_artifact(artifact, as_json=False)
