"""`deploykit quantize qat`."""

from __future__ import annotations

from typing import Any

import click

from deploykit.cli import common
from deploykit.cli.quantize_options import metric_option
from deploykit.cli.training_options import training_config, training_options, training_settings


@click.command("qat")
@click.argument("source")
@common.output_option
@common.data_option("What to train on, inputs by name and 'labels':", required=True)
@click.option(
    "--eval", "eval_data", metavar="DATA",
    help="The same, to be judged on; the weights that are best with rounding are kept.",
)  # fmt: skip
@metric_option("What is best on --eval; loss: its loss; NAME: a plugin's.", default="accuracy", further=("loss",))
@click.option("--max-drop", metavar="DROP", help="Fail where more of the trained module's metric is lost: 0.01, or 1%.")
@click.option(
    "--weight-bits", type=click.Choice(["auto", "8", "7"]), default="auto", show_default=True,
    help="auto: 7 where this CPU lacks VNNI, because 8-bit products saturate there.",
)  # fmt: skip
@training_options
@click.option("--resume", is_flag=True, help="Go on with the training in DIR.training, where there is one.")
@click.option(
    "--dynamic", multiple=True, metavar="SPEC",
    help="'batch' (default: the first axis of every input), 'none', or INPUT:AXIS=NAME,AXIS=NAME. Repeatable.",
)  # fmt: skip
@click.option(
    "--input", "inputs", multiple=True, metavar="SPEC",
    help="NAME=DTYPE[DIM,...][:LOW..HIGH], for a factory without example inputs. Repeatable.",
)  # fmt: skip
@common.dim_option
@click.option("--opset", type=int, help="ONNX opset; 18, or what --for allows, by default.")
@click.option("--task", metavar="TASK", help="What a Hugging Face model is for; inferred from its config by default.")
@common.device_option
@click.option("--allow-slower", is_flag=True, help="Accept and record a model that is not faster.")
@common.contract_option
@common.json_option
def qat(
    source: str,
    output: str,
    data: str,
    eval_data: str | None,
    metric: str,
    max_drop: str | None,
    weight_bits: str,
    resume: bool,
    dynamic: tuple[str, ...],
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    opset: int | None,
    task: str | None,
    devices: tuple[str, ...],
    allow_slower: bool,
    contract: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Train a PyTorch model with 8-bit rounding in the way, then quantize it as `static` does.

    For models that lose too much without. SOURCE is that of `deploykit finetune`; --learning-rate should be a tenth of
    that of its training. The training stands in DIR.training, and the trained model in floating point in
    DIR.training/float.
    """
    sizes = common.parse_dims(dims)
    settings = training_settings(given)
    from deploykit.optimizers import StaticConfig
    from deploykit.pipeline import quantize_qat

    artifact = quantize_qat(
        source, output, data=data, eval_data=eval_data, training=training_config(settings, metric),
        config=StaticConfig(weight_bits=weight_bits, max_samples=512), max_drop=max_drop, resume=resume,
        dynamic=dynamic, inputs=inputs, dims=sizes, opset=opset, task=task, devices=devices,
        allow_slower=allow_slower, contract=contract, progress=common.progress(),
    )  # fmt: skip
    common.show_artifact(artifact, as_json=as_json)
