"""`deploykit distill`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click

from deploykit.cli import common
from deploykit.cli.quantize_options import metric_option
from deploykit.cli.source_options import source_options, source_settings
from deploykit.cli.training_options import resume_option, training_config, training_options, training_settings

_PARTS = ("logits", "embedding", "features", "attention", "task")


def _weights(texts: Sequence[str]) -> dict[str, Any]:
    """Read `--weight PART=NUMBER`.

    Raises:
        click.BadParameter: Not of the form.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if name not in _PARTS or not 0 <= value < math.inf:
            raise click.BadParameter(f"--weight {text!r} is not PART=NUMBER; PART is one of {', '.join(_PARTS)}.")
        found[name] = value
    return found


def _pairs(texts: Sequence[str]) -> list[list[str]]:
    """Read `--features TEACHER=STUDENT`.

    Raises:
        click.BadParameter: Not of the form.
    """
    pairs = [[part.strip() for part in text.split("=")] for text in texts]
    wrong = next((t for t, pair in zip(texts, pairs, strict=True) if len(pair) != 2 or not all(pair)), None)
    if wrong is not None:
        raise click.BadParameter(f"--features {wrong!r} is not TEACHER=STUDENT, the names of two modules.")
    return pairs


@click.command()
@click.argument("teacher")
@common.output_option
@click.option(
    "--student", required=True, metavar="STUDENT",
    help="file.py:factory or a Hugging Face model directory, or derive:layers=N,width=F,ffn=F: fewer layers, narrower.",
)  # fmt: skip
@common.data_option("What to learn on, inputs by name, and 'labels' where there are any:", required=True)
@common.eval_option("What to be judged on after every epoch; the best weights are kept:")
@metric_option("Of teacher and student on --eval; loss: the loss; NAME: a plugin's.", default=None, further=("loss",))
@click.option(
    "--max-drop", metavar="DROP", help="Fail where more of the teacher's metric is lost: 0.01 in its units, or 1%."
)
@click.option(
    "--kind", type=click.Choice(["auto", "classification", "embedding", "frames"]), default="auto", show_default=True,
    help="What the models give; frames: classes at every position (CTC, keywords, tagging).",
)  # fmt: skip
@click.option(
    "--temperature", type=click.FloatRange(0, min_open=True), default=4.0, show_default=True,
    help="Softens the scores of both before they are compared.",
)  # fmt: skip
@click.option(
    "--weight", "weights", multiple=True, metavar="PART=NUMBER",
    help="Weight of a part of the loss: logits (0.9), task (0.1, where there are labels), embedding (1), features, "
    "attention. Repeatable.",
)  # fmt: skip
@click.option(
    "--features", "pairs", multiple=True, metavar="TEACHER=STUDENT",
    help="Modules whose outputs are compared, with --weight features=NUMBER; by default the repeated blocks, evenly. "
    "Repeatable.",
)  # fmt: skip
@click.option(
    "--attention-layers", type=click.Choice(["last", "all"]), default="last", show_default=True,
    help="Which are compared, with --weight attention=NUMBER.",
)  # fmt: skip
@click.option(
    "--embedding-loss", type=click.Choice(["auto", "cosine", "mse", "similarity"]), default="auto", show_default=True,
    help="auto: cosine, or between embeddings of other widths the similarity of the rows of a batch.",
)  # fmt: skip
@click.option("--output-name", "output_name", metavar="NAME", help="The output that is compared.")
@click.option(
    "--cache", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True,
    help="Ask the teacher once, and keep its answers for all epochs.",
)  # fmt: skip
@training_options
@resume_option
@source_options
@common.device_option
@common.json_option
@common.dry_run_option
def command(
    teacher: str,
    output: str,
    student: str,
    data: str,
    eval_data: str | None,
    metric: str | None,
    max_drop: str | None,
    kind: str,
    temperature: float,
    weights: tuple[str, ...],
    pairs: tuple[str, ...],
    attention_layers: str,
    embedding_loss: str,
    output_name: str | None,
    cache: str,
    resume: bool,
    devices: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
    **given: Any,
) -> None:
    """Train a small student to answer as a large teacher does, and turn it into a verified ONNX artifact.

    TEACHER is file.py:factory, package.module:factory, or a Hugging Face model directory; it is not changed. The
    training stands in DIR.training, with the student's weights in student/. After a crash, or Ctrl-C, --resume goes on
    with it.
    """
    parts, named = _weights(weights), _pairs(pairs)
    training = training_settings(given)
    loss: dict[str, Any] = {
        "kind": kind, "temperature": temperature, "attention_layers": attention_layers,
        "embedding_loss": embedding_loss, "cache": cache,
    }  # fmt: skip
    shared: dict[str, Any] = {
        "student": student, "data": data, "eval_data": eval_data, "metric": metric, "max_drop": max_drop,
        **source_settings(given), "devices": list(devices),
    }  # fmt: skip
    if dry_run:
        named_loss = {**loss, "weights": parts, "pairs": named, "output_name": output_name}
        common.show_recipe("distill", {"teacher": teacher, **shared, **named_loss, **training})
        return
    from deploykit.optimizers.distillation import DistillConfig
    from deploykit.pipeline import distill

    config = DistillConfig(**loss, **parts, pairs=tuple((t, s) for t, s in named), output=output_name)
    artifact = distill(
        teacher, output, config=config, training=training_config(training), resume=resume,
        progress=common.progress(), **shared,
    )  # fmt: skip
    common.show_artifact(artifact, as_json=as_json)
    if not as_json:
        click.echo(f"  trained {output.rstrip('/')}.training: student/, history.json, logs for TensorBoard")
