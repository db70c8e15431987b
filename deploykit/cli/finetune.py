"""`deploykit finetune`."""

from __future__ import annotations

from typing import Any

import click

from deploykit.cli import common
from deploykit.cli.quantize_options import metric_option
from deploykit.cli.source_options import part_option, source_options, source_settings
from deploykit.cli.training_options import resume_option, training_config, training_options, training_settings


@click.command()
@click.argument("source")
@common.output_option
@common.data_option("What to train on, inputs by name and 'labels':", required=True)
@common.eval_option("The same for the metric after every epoch; the best weights are kept:")
@metric_option("What is best on --eval; loss: its loss; NAME: a plugin's.", default="accuracy", further=("loss",))
@training_options
@resume_option
@source_options
@part_option
@common.device_option
@common.json_option
@common.dry_run_option
def command(
    source: str,
    output: str,
    data: str,
    eval_data: str | None,
    metric: str,
    resume: bool,
    part: str | None,
    devices: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
    **given: Any,
) -> None:
    """Train a PyTorch model further, and turn it into a verified ONNX artifact.

    SOURCE is file.py:factory, package.module:factory, or a Hugging Face model directory. The training stands in
    DIR.training: checkpoints, logs for TensorBoard, history.json, and weights.pt, the trained weights; of a Hugging
    Face model also model/, a directory like SOURCE. After a crash, or Ctrl-C, --resume goes on with it.
    """
    training = training_settings(given)
    shared: dict[str, Any] = {
        "data": data, "eval_data": eval_data, **source_settings(given), "part": part, "devices": list(devices),
    }  # fmt: skip
    if dry_run:
        common.show_recipe("finetune", {"source": source, "metric": metric, **training, **shared})
        return
    from deploykit.pipeline import finetune

    artifact = finetune(
        source,
        output,
        config=training_config(training, metric=metric),
        resume=resume,
        progress=common.progress(),
        **shared,
    )
    common.show_artifact(artifact, as_json=as_json)
    if not as_json:
        click.echo(f"  trained {output.rstrip('/')}.training: weights.pt, history.json, logs for TensorBoard")
