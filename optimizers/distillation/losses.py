"""Distances between what a teacher and a student compute; every one is a mean, so that it hangs on no batch size."""

from __future__ import annotations

from typing import Any

from deploykit.extras import require

# exp(-100) is 0 in float32: what is smaller makes no difference, and minus infinity would make NaN.
_LOWEST_LOG = -100.0
_TINY = 1e-9


def class_scores(output: Any, *, probabilities: bool) -> Any:
    """Scores whose softmax is the distribution over the classes.

    Args:
        output: [..., classes], or one score for the second of two classes: [batch] or [..., 1].
        probabilities: Whether they are probabilities and not scores.

    Returns:
        float32[..., classes], two of them where there was one score.
    """
    torch = require("torch", extra="train")
    values = output.float()
    if values.ndim == 1:
        values = values[:, None]
    if probabilities:
        values = values.clamp(1e-7, 1)
        return torch.cat([(1 - values).clamp_min(1e-7), values], -1).log() if values.shape[-1] == 1 else values.log()
    # sigmoid(z) is the softmax of (0, z).
    return torch.cat([torch.zeros_like(values), values], -1) if values.shape[-1] == 1 else values


def soft_divergence(student: Any, teacher: Any, temperature: float, mask: Any = None) -> Any:
    """Kullback-Leibler divergence of the student's softened classes from the teacher's, times the squared temperature.

    The gradients of softened scores shrink with the square of the temperature T; the factor keeps their size beside a
    loss on labels (Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, section 2).

    Args:
        student: Scores, float[batch, classes] or float[batch, positions, classes].
        teacher: The same of the teacher.
        temperature: T.
        mask: [batch, positions], 0 at positions that do not count; None where all do.
    """
    torch = require("torch", extra="train")
    log_q = torch.log_softmax(student.float() / temperature, -1).clamp_min(_LOWEST_LOG)
    log_p = torch.log_softmax(teacher.float() / temperature, -1).clamp_min(_LOWEST_LOG)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return _mean(divergence, mask) * temperature**2


def pooled(output: Any, mask: Any = None) -> Any:
    """Embeddings [batch, width]: as they are, or the mean over the real positions of [batch, sequence, width].

    The mean over tokens is the pooling of Sentence-BERT (Reimers and Gurevych, 2019).
    """
    values = output.float()
    if values.ndim == 2:
        return values
    if mask is None:
        return values.mean(1)
    weights = mask[..., None].to(values.dtype)
    return (values * weights).sum(1) / weights.sum(1).clamp_min(_TINY)


def embedding_distance(student: Any, teacher: Any, kind: str) -> Any:
    """Distance between embeddings of the same rows.

    Args:
        student: float[batch, width].
        teacher: float[batch, width]; for "similarity" the widths may differ.
        kind: "cosine" (1 - cosine), "mse", or "similarity": the mean squared difference of the cosines between
            different rows (Tung and Mori: Similarity-Preserving Knowledge Distillation, 2019); 0 for a single row.
    """
    torch = require("torch", extra="train")
    if kind == "mse":
        return torch.nn.functional.mse_loss(student, teacher)
    if kind == "cosine":
        return (1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)).mean()
    ours, theirs = (torch.nn.functional.normalize(e, dim=-1) for e in (student, teacher))
    error = (ours @ ours.T - theirs @ theirs.T).square()
    rows = len(student)
    # The diagonal is 0 whatever the embeddings are.
    return error.sum() / max(rows * (rows - 1), 1)


def feature_distance(student: Any, teacher: Any, mask: Any = None) -> Any:
    """Mean squared error between features of the same width, relative to the mean square of the teacher's.

    FitNets (Romero et al., 2015) takes the plain error; divided by the teacher's power, one weight serves every layer.
    Maps of different sizes [batch, channels, height, width] are averaged down to the smaller.

    Args:
        student: float[batch, ...].
        teacher: float[batch, ...].
        mask: [batch, sequence] for features [batch, sequence, width].
    """
    ours, theirs = _same_places(student.float(), teacher.float())
    if mask is not None and ours.ndim == 3 and ours.shape[:2] == mask.shape:
        real = mask.bool()
        ours, theirs = ours[real], theirs[real]
    return (ours - theirs).square().mean() / theirs.square().mean().clamp_min(_TINY)


def _same_places(student: Any, teacher: Any) -> tuple[Any, Any]:
    """Both with the smaller number of rows and columns."""
    torch = require("torch", extra="train")
    if student.ndim != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = tuple(min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    shrink = torch.nn.functional.adaptive_avg_pool2d
    return shrink(student, size), shrink(teacher, size)


def attention_divergence(student: Any, teacher: Any, mask: Any = None) -> Any:
    """Kullback-Leibler divergence of the student's attention from the teacher's, a mean over heads and queries.

    MiniLM (Wang et al., 2020, section 3.1). Where the numbers of heads differ, the means over the heads are compared.

    Args:
        student: Distributions over the last axis, float[batch, heads, queries, keys] or float[batch, queries, keys].
        teacher: The same of the teacher.
        mask: [batch, queries], 0 at padding.
    """
    ours, theirs = (a if a.ndim == 4 else a[:, None] for a in (student.float(), teacher.float()))
    if ours.shape[1] != theirs.shape[1]:
        ours, theirs = ours.mean(1, keepdim=True), theirs.mean(1, keepdim=True)
    log_q, log_p = ours.clamp_min(_TINY).log(), theirs.clamp_min(_TINY).log()
    return _mean((theirs * (log_p - log_q)).sum(-1).mean(1), mask)


def _mean(values: Any, mask: Any) -> Any:
    if mask is None or values.shape != mask.shape:
        return values.mean()
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp_min(1)
