"""`deploykit export`."""

from __future__ import annotations

import click

from deploykit.cli import common


@click.command()
@click.argument("source")
@common.output_option
@click.option(
    "--dynamic", multiple=True, metavar="SPEC",
    help="'batch' (default: the first axis of every input), 'none', or INPUT:AXIS=NAME,AXIS=NAME. Repeatable.",
)  # fmt: skip
@click.option(
    "--input", "inputs", multiple=True, metavar="SPEC",
    help="NAME=DTYPE[DIM,...][:LOW..HIGH], for a factory without example inputs: "
    "'x=float32[batch,3,224,224]'. Repeatable.",
)  # fmt: skip
@click.option("--opset", type=int, help="ONNX opset; 18, or what --for allows, by default.")
@click.option(
    "--exporter", type=click.Choice(["auto", "torch.export", "torchscript"]), default="auto", show_default=True,
    help="How PyTorch becomes ONNX; auto tries torch.export first and says why where it falls back.",
)  # fmt: skip
@click.option(
    "--task", metavar="TASK",
    help="What a Hugging Face model is for, such as text-classification; inferred from its config by default.",
)  # fmt: skip
@click.option(
    "--part", metavar="PART",
    help="One graph of a model that becomes several: encoder or decoder, text or image. All of them by default.",
)  # fmt: skip
@click.option(
    "--timeout", "timeout_s", type=common.seconds, metavar="SECONDS",
    help="CPU seconds that one way to ONNX may take; by default 40 and more for large modules, and five times that "
    "where no other way is left.",
)  # fmt: skip
@common.data_option("Real inputs for the parity check:")
@common.dim_option
@common.device_option
@common.contract_option
@click.option("--allow-unverified", is_flag=True, help="Keep a model whose outputs do not react to its inputs.")
@common.json_option
@common.dry_run_option
def command(
    source: str,
    output: str,
    dynamic: tuple[str, ...],
    inputs: tuple[str, ...],
    opset: int | None,
    exporter: str,
    task: str | None,
    part: str | None,
    timeout_s: float | None,
    data: str | None,
    dims: tuple[str, ...],
    devices: tuple[str, ...],
    contract: tuple[str, ...],
    allow_unverified: bool,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Turn a model into a verified ONNX artifact.

    SOURCE is file.py:factory, package.module:factory, a .pt2, .keras, .tflite, .skops or .onnx file, a Hugging Face
    model directory, or a SavedModel directory (DIR or DIR:signature). A factory returns a PyTorch module, a Keras model
    or a scikit-learn estimator. The result is run beside the source at several shapes; where the numbers differ,
    nothing is written.

    A model that becomes several graphs (an encoder and a decoder with its key-value cache, the towers of CLIP) gives
    one artifact each: DIR/encoder, DIR/decoder.
    """
    sizes = common.parse_dims(dims)
    params = {
        "source": source, "dynamic": list(dynamic), "inputs": list(inputs), "opset": opset, "exporter": exporter,
        "timeout_s": timeout_s, "task": task, "part": part, "data": data, "dims": sizes, "devices": list(devices),
        "contract": list(contract),
        "allow_unverified": allow_unverified or None,
    }  # fmt: skip
    if dry_run:
        common.show_recipe("export", params)
        return
    from deploykit.pipeline import export_parts

    made = export_parts(
        source, output, dynamic=dynamic, inputs=inputs, dims=sizes, opset=opset, exporter=exporter, data=data,
        timeout_s=timeout_s, task=task, part=part, devices=devices, contract=contract,
        allow_unverified=allow_unverified,
        progress=common.progress(),
    )  # fmt: skip
    if "" in made or part is not None:
        common.show_artifact(next(iter(made.values())), as_json=as_json)
    elif as_json:
        common.show_json({name: common.artifact_record(artifact) for name, artifact in made.items()})
    else:
        for artifact in made.values():
            common.show_artifact(artifact, as_json=False)
