"""`deploykit prune`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from deploykit.cli import common
from deploykit.cli.quantize_options import metric_option, speed_options
from deploykit.cli.source_options import part_option, source_options, source_settings
from deploykit.cli.training_options import resume_option, training_config, training_options, training_settings


@click.command()
@click.argument("source")
@common.output_option
@click.option(
    "--method", type=click.Choice(["structured", "magnitude", "2:4"]), default="structured", show_default=True,
    help="structured: channels, heads and neurons go. magnitude, 2:4: weights are set to zero, which makes no model "
    "faster on CPUs.",
)  # fmt: skip
@click.option(
    "--ratio", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="SHARE",
    help="Share of the channels that go (structured), or of the weights that become zero (magnitude).",
)  # fmt: skip
@click.option(
    "--speedup", type=click.FloatRange(1, min_open=True), metavar="TIMES",
    help="In place of a ratio: as much faster as this on the first --device; pruned copies are timed to find it.",
)  # fmt: skip
@click.option(
    "--latency-ms", type=click.FloatRange(0, min_open=True), metavar="MS",
    help="In place of a ratio: milliseconds a request on the first --device.",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(1), default=1, show_default=True, help="Prune in so many steps; train after each."
)
@click.option(
    "--round-to", type=click.IntRange(1), default=16, show_default=True,
    help="Channels are kept in multiples of this, which is what CPUs compute at once.",
)  # fmt: skip
@click.option(
    "--importance", type=click.Choice(["auto", "magnitude", "taylor"]), default="auto", show_default=True,
    help="What tells which channels go; taylor: what their loss costs, by the gradient; auto: that, with labels.",
)  # fmt: skip
@click.option(
    "--allocation", type=click.Choice(["sensitivity", "uniform"]), default="sensitivity", show_default=True,
    help="sensitivity: more where the outputs mind it less for what it saves (magnitude: the smallest weights over "
    "all layers); uniform: the same share everywhere.",
)  # fmt: skip
@click.option(
    "--max-ratio", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.9, show_default=True,
    help="The most that one group of channels, or one weight, may lose.",
)  # fmt: skip
@click.option(
    "--keep", multiple=True, metavar="NAME",
    help="A part of the module that stays as it is, such as 'encoder.layer.0' or '*.head'; refused where there is "
    "none of this name. Repeatable.",
)  # fmt: skip
@common.data_option("Training data with 'labels', for the recovery and for the importance:")
@click.option("--no-recovery", is_flag=True, help="Do not train after pruning; --data serves the importance alone.")
@common.eval_option("Data with 'labels' that the metric is measured on, before and after:")
@metric_option("What is measured on --eval; NAME: a plugin's. accuracy by default.")
@click.option("--max-drop", metavar="DROP", help="What of the metric may be lost: 0.01 in its units, or 1%.")
@training_options
@resume_option
@speed_options
@source_options
@part_option
@click.option("--allow-unverified", is_flag=True, help="Keep a model whose outputs do not react to its inputs.")
@common.json_option
@common.dry_run_option
def command(
    source: str,
    output: str,
    method: str,
    ratio: float | None,
    speedup: float | None,
    latency_ms: float | None,
    steps: int,
    round_to: int,
    importance: str,
    allocation: str,
    max_ratio: float,
    keep: tuple[str, ...],
    data: str | None,
    no_recovery: bool,
    eval_data: str | None,
    metric: str | None,
    max_drop: str | None,
    resume: bool,
    devices: tuple[str, ...],
    allow_slower: bool,
    gate_seconds: float,
    part: str | None,
    allow_unverified: bool,
    as_json: bool,
    dry_run: bool,
    **given: Any,
) -> None:
    """Take out of a PyTorch model what matters least, train it again, and prove what that gives.

    SOURCE is file.py:factory, package.module:factory, or a Hugging Face model directory. Give one goal: --ratio,
    --speedup or --latency-ms. The result is an artifact as export makes it, timed against the module as it was; its
    torch/ holds the weights, the structure and a .pt2 program, to be trained on. While it trains, DIR.training holds
    how far it is; after a crash, Ctrl-C, or a target missed on a busy machine, --resume goes on with it.
    """
    training = training_settings(given)
    trained = data is not None and not no_recovery
    if not trained:
        _refuse_settings(click.get_current_context(), [*training, "resume"])
    options = {
        "method": method, "ratio": ratio, "speedup": speedup, "latency_ms": latency_ms, "steps": steps,
        "round_to": round_to, "importance": importance, "allocation": allocation, "max_ratio": max_ratio,
        "keep": list(keep),
    }  # fmt: skip
    shared: dict[str, Any] = {
        "data": data, "eval_data": eval_data, "metric": metric, "max_drop": max_drop, "devices": list(devices),
        "allow_slower": allow_slower, "gate_seconds": gate_seconds, **source_settings(given), "part": part,
        "allow_unverified": allow_unverified,
    }  # fmt: skip
    if dry_run:
        recovery = training if trained else {}
        common.show_recipe("prune", {"source": source, **options, **shared, "recovery": trained, **recovery})
        return
    from deploykit.optimizers.pruning import PruneConfig
    from deploykit.pipeline import prune

    config = PruneConfig(method, ratio, steps, round_to, importance, allocation, max_ratio, keep)
    artifact = prune(
        source, output, config=config, speedup=speedup, latency_ms=latency_ms,
        training=training_config(training) if trained else None, resume=resume, progress=common.progress(),
        **shared,
    )  # fmt: skip
    common.show_artifact(artifact, as_json=as_json)
    if not as_json:
        for line in _lines(artifact.manifest.lineage[0].params):
            click.echo(line)


def _refuse_settings(context: click.Context, settings: Sequence[str]) -> None:
    """Refuse settings of a training that is not done.

    Raises:
        click.UsageError: One is given.
    """
    from click.core import ParameterSource

    for name in settings:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = next(p.opts[0] for p in context.command.params if p.name == name)
            raise click.UsageError(f"{option} is for the training after pruning, which needs --data.", context)


def _lines(params: dict[str, Any]) -> list[str]:
    """What went, in words."""
    if "sparsity" in params:
        where = {"2:4": "two of every four", "magnitude": "the smallest over all of them"}[params["method"]]
        if params["allocation"] == "uniform":
            where = "the smallest of each"
        return [
            f"  zeros   {params['sparsity']:.2%} of {params['weights']:,} weights in {len(params['layers'])} tensors, "
            f"{where}; {params['zeros'] / params['parameters']:.2%} of all {params['parameters']:,} parameters"
        ]
    (before, after), (macs, fewer) = params["parameters"], params["macs"]
    return [
        f"  pruned  {params['ratio']:.1%} of the channels in {len(params['channels'])} groups: "
        f"{before:,} -> {after:,} parameters, {macs:,} -> {fewer:,} multiply-accumulates",
        "  torch   torch/model.safetensors, structure.json, program.pt2: to be trained on",
    ]
