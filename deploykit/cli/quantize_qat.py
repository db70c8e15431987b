"""`deploykit quantize qat`."""

from __future__ import annotations

from typing import Any

import click

from deploykit.cli import common
from deploykit.cli.quantize_options import metric_option, speed_options
from deploykit.cli.source_options import source_options, source_settings
from deploykit.cli.training_options import resume_option, training_config, training_options, training_settings


# What a trained model needs: the usual settings are for one that is trained from its beginning.
@click.command("qat", context_settings={"default_map": {"epochs": 5, "learning_rate": 1e-4}})
@click.argument("source")
@common.output_option
@common.data_option("What to train on, inputs by name and 'labels':", required=True)
@common.eval_option("The same, to be judged on; the weights that are best with rounding are kept:")
@metric_option("What is best on --eval; loss: its loss; NAME: a plugin's.", default="accuracy", further=("loss",))
@click.option("--max-drop", metavar="DROP", help="Fail where more of the trained module's metric is lost: 0.01, or 1%.")
@click.option(
    "--weight-bits", type=click.Choice(["auto", "8", "7"]), default="auto", show_default=True,
    help="auto: 7 where this CPU lacks VNNI, because 8-bit products saturate there.",
)  # fmt: skip
@training_options
@resume_option
@source_options
@speed_options
@common.json_option
@common.dry_run_option
def qat(
    source: str,
    output: str,
    data: str,
    eval_data: str | None,
    metric: str,
    max_drop: str | None,
    weight_bits: str,
    resume: bool,
    devices: tuple[str, ...],
    allow_slower: bool,
    gate_seconds: float,
    as_json: bool,
    dry_run: bool,
    **given: Any,
) -> None:
    """Train a PyTorch model with 8-bit rounding in the way, then quantize it as `static` does.

    For models that lose too much without. SOURCE is that of `deploykit finetune`; --learning-rate should be a tenth of
    that of its training, or less. The training stands in DIR.training, and the trained model in floating point in
    DIR.training/float.
    """
    training = training_settings(given)
    shared: dict[str, Any] = {
        "data": data, "eval_data": eval_data, "max_drop": max_drop, **source_settings(given), "devices": list(devices),
        "allow_slower": allow_slower, "gate_seconds": gate_seconds,
    }  # fmt: skip
    if dry_run:
        params = {"source": source, "metric": metric, "weight_bits": weight_bits, **training, **shared}
        common.show_recipe("quantize-qat", params)
        return
    from deploykit.optimizers import StaticConfig
    from deploykit.pipeline import quantize_qat

    artifact = quantize_qat(
        source, output, config=StaticConfig(weight_bits=weight_bits), training=training_config(training, metric=metric),
        resume=resume, progress=common.progress(), **shared,
    )  # fmt: skip
    common.show_artifact(artifact, as_json=as_json)
