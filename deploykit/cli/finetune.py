"""`deploykit finetune`."""

from __future__ import annotations

from typing import Any

import click

from deploykit.cli import common
from deploykit.cli.quantize_options import metric_option
from deploykit.cli.training_options import training_config, training_options, training_settings


@click.command()
@click.argument("source")
@common.output_option
@common.data_option("What to train on, inputs by name and 'labels':", required=True)
@click.option(
    "--eval", "eval_data", metavar="DATA",
    help="The same for the metric after every epoch; the best weights are kept. FILE.npz, a directory of .npy, or "
    "module:function.",
)  # fmt: skip
@metric_option("What is best on --eval; loss: its loss; NAME: a plugin's.", default="accuracy", further=("loss",))
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
@click.option("--part", metavar="PART", help="One graph of a model that becomes several.")
@common.device_option
@common.contract_option
@common.json_option
@common.dry_run_option
def command(
    source: str,
    output: str,
    data: str,
    eval_data: str | None,
    metric: str,
    resume: bool,
    dynamic: tuple[str, ...],
    inputs: tuple[str, ...],
    dims: tuple[str, ...],
    opset: int | None,
    task: str | None,
    part: str | None,
    devices: tuple[str, ...],
    contract: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
    **given: Any,
) -> None:
    """Train a PyTorch model further, and turn it into a verified ONNX artifact.

    SOURCE is file.py:factory, package.module:factory, or a Hugging Face model directory. The training stands in
    DIR.training: checkpoints, logs for TensorBoard, history.json, and weights.pt, the trained weights. After a crash,
    or Ctrl-C, --resume goes on with it.
    """
    sizes = common.parse_dims(dims)
    settings = training_settings(given)
    if dry_run:
        params = {
            "source": source, "data": data, "eval_data": eval_data, "metric": metric, **settings,
            "clip_norm": settings["clip_norm"] or 0.0, "dynamic": list(dynamic), "inputs": list(inputs), "dims": sizes,
            "opset": opset, "task": task, "part": part, "devices": list(devices), "contract": list(contract),
        }  # fmt: skip
        common.show_recipe("finetune", params)
        return
    from deploykit.pipeline import finetune

    artifact = finetune(
        source, output, data=data, eval_data=eval_data, config=training_config(settings, metric), resume=resume,
        dynamic=dynamic, inputs=inputs, dims=sizes, opset=opset, task=task, part=part, devices=devices,
        contract=contract, progress=common.progress(),
    )  # fmt: skip
    common.show_artifact(artifact, as_json=as_json)
    if not as_json:
        click.echo(f"  trained {output.rstrip('/')}.training: weights.pt, history.json, logs for TensorBoard")
