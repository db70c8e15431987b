"""What a distillation is told."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deploykit.errors import OptimizationError

KINDS = ("auto", "classification", "embedding", "frames")
EMBEDDING_LOSSES = ("auto", "cosine", "mse", "similarity")
ATTENTION_LAYERS = ("last", "all")
CACHES = ("auto", "on", "off")
# The parts of the loss, by the field that holds the weight.
PARTS = ("logits", "embedding", "features", "attention", "task")


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """Which distances between student and teacher are minimised, each with its weight.

    A weight of None is the default of the kind of model: logits 0.9 beside a task loss of 0.1 where there are labels,
    logits 1 where there are none; embeddings 1. Features and attention are off unless a weight is given.

    Attributes:
        kind: What the models give: "classification" (scores of classes, [batch, classes]), "embedding" (vectors,
            [batch, width] or [batch, sequence, width]), "frames" (scores at every position, [batch, positions,
            classes]: CTC, keywords, tagging), or "auto": from the output's name and shape, and from the labels.
        temperature: Divides the scores of both before the softmax; the loss is multiplied by its square, so that its
            gradients keep their size (Hinton et al., 2015).
        logits: Weight of the Kullback-Leibler divergence between the softened scores.
        embedding: Weight of the distance between embeddings.
        features: Weight of the distance between the outputs of paired inner modules (FitNets, Romero et al., 2015).
        attention: Weight of the divergence between attention distributions (MiniLM, Wang et al., 2020).
        task: Weight of the loss on labels, which is the training's own loss.
        embedding_loss: "cosine" or "mse" between embeddings, through a learned projection where the widths differ;
            "similarity" between the matrices of cosines within a batch (Tung and Mori, 2019), for any widths; "auto":
            cosine where the widths are equal, similarity where they are not.
        pairs: Modules whose outputs are compared, as (teacher's name, student's name); by default the repeated blocks,
            evenly.
        attention_layers: "last", as MiniLM, or "all": the student's with the teacher's, evenly.
        output: Name of the judged output, of both; by default the one that the kind asks for.
        cache: Whether the teacher answers once, when the data are read, and its answers are kept for all epochs:
            "auto" where nothing inside of the teacher is compared, and they take a GiB at most.
    """

    kind: str = "auto"
    temperature: float = 4.0
    logits: float | None = None
    embedding: float | None = None
    features: float | None = None
    attention: float | None = None
    task: float | None = None
    embedding_loss: str = "auto"
    pairs: tuple[tuple[str, str], ...] = ()
    attention_layers: str = "last"
    output: str | None = None
    cache: str = "auto"


def check_distill_config(config: DistillConfig) -> None:
    """Refuse what no distillation can be made of.

    Raises:
        OptimizationError: An unknown word, or a number that is out of range.
    """
    for name, known in (
        ("kind", KINDS),
        ("embedding_loss", EMBEDDING_LOSSES),
        ("attention_layers", ATTENTION_LAYERS),
        ("cache", CACHES),
    ):
        value = getattr(config, name)
        if value not in known:
            raise OptimizationError(f"{name.replace('_', ' ')} {value!r}", expected=" or ".join(known))
    if not 0 < config.temperature < math.inf:
        raise OptimizationError(f"temperature {config.temperature!r}", expected="a positive number, like 4")
    for name in PARTS:
        weight = getattr(config, name)
        if weight is not None and not 0 <= weight < math.inf:
            raise OptimizationError(f"weight {name}={weight!r}", expected="0 or a positive number")
    if config.pairs and not config.features:
        raise OptimizationError(
            "pairs of modules are given, and the features have no weight", hint="add --weight features=1"
        )
