"""A student out of a teacher: fewer layers, taken evenly with their weights, and narrower ones.

What a narrower layer keeps are the teacher's strongest heads, neurons and channels, so that the student's weights are
parts of the teacher's. It is a start for training and no working model: layer normalizations see other statistics.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploykit.errors import OptimizationError, first_line
from deploykit.extras import require
from deploykit.optimizers.distillation.narrowing import Widths, narrow

_FORM = "derive:layers=N, derive:width=F or derive:ffn=F, or several of them with commas between"
_OWN = "build the student yourself: --student file.py:factory"
# Names of the inner width of a feed-forward network, in the configs of transformers.
_FFN = ("intermediate_size", "ffn_dim", "hidden_dim", "n_inner")
_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Derivation:
    """What is asked of a derived student.

    Attributes:
        layers: Repeated layers that it has; None for the teacher's.
        width: Share of heads, hidden channels and inner neurons that it keeps.
        ffn: Share of the feed-forward networks' inner neurons that it keeps; None for ``width``.
    """

    layers: int | None = None
    width: float | None = None
    ffn: float | None = None


@dataclass(frozen=True, slots=True)
class Derived:
    """A student.

    Attributes:
        module: In evaluation mode.
        copied: Tensors that are the teacher's.
        cut: Tensors that are parts of the teacher's.
        fresh: Tensors that start anew.
        notes: What the user must know.
    """

    module: Any
    copied: int
    cut: int
    fresh: int
    notes: tuple[str, ...]


def parse_derivation(text: str) -> Derivation:
    """Read `derive:layers=3,width=0.5,ffn=0.25`.

    Raises:
        OptimizationError: It cannot be read, or a number is out of range.
    """
    found: dict[str, float] = {}
    for part in text.removeprefix("derive:").split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        right = number >= 1 and number == int(number) if name == "layers" and math.isfinite(number) else 0 < number <= 1
        if name not in ("layers", "width", "ffn") or name in found or not right:
            raise OptimizationError(
                f"cannot read {part!r} of the student {text!r}",
                expected=f"{_FORM}; N is a number of layers, F a share like 0.5",
            )
        found[name] = number
    layers = found.get("layers")
    return Derivation(None if layers is None else int(layers), found.get("width"), found.get("ffn"))


def evenly(count: int, kept: int) -> tuple[int, ...]:
    """Which of ``count`` layers are kept: the first, the last, and what lies evenly between.

    For 12 layers and 6 of them that is 0, 2, 4, 7, 9, 11, the choice of DistilBERT (Sanh et al., 2019).
    """
    if kept == 1:
        return (0,)
    return tuple(int(i * (count - 1) / (kept - 1) + 0.5) for i in range(kept))


def derive_student(teacher: Any, asked: Derivation, *, seed: int = 0) -> Derived:
    """Build a smaller model of the teacher's class from its config, with the teacher's weights.

    Args:
        teacher: A model of transformers; it is not changed.
        asked: How small.
        seed: Of what starts anew.

    Raises:
        OptimizationError: It is no such model, or its config does not say how to make a smaller one.
    """
    torch = require("torch", extra="train")
    config = _config_of(teacher)
    changes: dict[str, Any] = {}
    if asked.layers is not None:
        changes |= _fewer_layers(config, asked.layers)
    widths = _widths(config, asked)
    changes |= widths.changes if widths is not None else {}
    if all(_same(getattr(config, name), value) for name, value in changes.items()):
        raise OptimizationError("the derived student is as large as the teacher", expected=_FORM)
    smaller = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(smaller, name, value)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        try:
            student = type(teacher)(smaller)
        except Exception as exc:
            said = ", ".join(f"{name}={value}" for name, value in changes.items())
            raise OptimizationError(
                f"{type(teacher).__name__} cannot be built with {said} ({first_line(exc)})", hint=_OWN
            ) from exc
    return _with_weights(teacher, student.eval(), widths, changes)


def _same(old: Any, new: Any) -> bool:
    return list(old) == list(new) if isinstance(old, list | tuple) else bool(old == new)


def _config_of(teacher: Any) -> Any:
    """The teacher's config.

    Raises:
        OptimizationError: There is none that a smaller model can be made of.
    """
    transformers = sys.modules.get("transformers")
    kind = type(teacher).__name__
    if transformers is None or not isinstance(teacher, transformers.PreTrainedModel):
        raise OptimizationError(
            f"no student can be derived from a {kind}: only models of transformers say in their config how to build a "
            "smaller one",
            hint=_OWN,
        )
    config = teacher.config
    if getattr(config, "is_encoder_decoder", False):
        raise OptimizationError(f"no student can be derived from {kind}, which has an encoder and a decoder", hint=_OWN)
    if "config" not in inspect.signature(type(teacher).__init__).parameters:
        raise OptimizationError(f"{kind} is not built from a config alone", hint=_OWN)
    return config


def _fewer_layers(config: Any, layers: int) -> dict[str, Any]:
    """Changes of the config for that many layers."""
    depths = getattr(config, "depths", None)
    if isinstance(depths, list | tuple) and depths:
        total = sum(depths)
        if not len(depths) <= layers <= total:
            raise OptimizationError(
                f"{layers} layers of a network whose {len(depths)} stages have {', '.join(map(str, depths))}",
                expected=f"{len(depths)} to {total}",
            )
        return {"depths": type(depths)(_shared(depths, layers))}
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise OptimizationError(f"{type(config).__name__} names no number of layers", hint=_OWN)
    if layers > count:
        raise OptimizationError(f"{layers} layers of a teacher with {count}", expected=f"1 to {count}")
    changes: dict[str, Any] = {"num_hidden_layers": layers}
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == count:
        changes["layer_types"] = [kinds[i] for i in evenly(count, layers)]
    return changes


def _shared(depths: Sequence[int], layers: int) -> list[int]:
    """Blocks of each stage in proportion to what it had, at least one, ``layers`` in all."""
    found = [1] * len(depths)
    for _ in range(layers - len(depths)):
        # The stage that is furthest behind its share gets the next one.
        open_stages = [i for i, depth in enumerate(depths) if found[i] < depth]
        found[min(open_stages, key=lambda i: found[i] / depths[i])] += 1
    return found


def _widths(config: Any, asked: Derivation) -> Widths | None:
    """Sizes before and after, where the student is narrower."""
    if asked.width is None and asked.ffn is None:
        return None
    stages = getattr(config, "hidden_sizes", None)
    if isinstance(stages, list | tuple):
        return _channels(config, asked)
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    inner = next((n for n in _FFN if isinstance(getattr(config, n, None), int)), None)
    if not isinstance(hidden, int) or not isinstance(heads, int) or inner is None:
        raise OptimizationError(
            f"{type(config).__name__} does not tell its hidden size, heads and feed-forward size", hint=_OWN
        )
    if getattr(config, "num_key_value_heads", None) not in (None, heads):
        raise OptimizationError("a model whose heads share keys cannot be narrowed", hint=f"leave width out, or {_OWN}")
    size = getattr(config, "head_dim", None) or hidden // heads
    changes: dict[str, Any] = {}
    kept = heads
    if asked.width is not None:
        if size * heads != hidden:
            raise OptimizationError("a model whose heads are wider than its hidden size cannot be narrowed", hint=_OWN)
        kept = max(1, int(heads * asked.width + 0.5))
        changes = {"num_attention_heads": kept, "hidden_size": kept * size}
        if getattr(config, "num_key_value_heads", None) is not None:
            changes["num_key_value_heads"] = kept
    share = asked.ffn if asked.ffn is not None else asked.width
    neurons = getattr(config, inner)
    changes[inner] = _rounded(neurons, share or 1.0)
    return Widths((hidden, kept * size), (neurons, changes[inner]), size, changes)


def _channels(config: Any, asked: Derivation) -> Widths:
    """Of a convolutional network: fewer channels in every stage; its weights start anew."""
    if asked.ffn is not None or asked.width is None:
        raise OptimizationError(f"{type(config).__name__} has no feed-forward networks", expected="derive:width=F")
    if isinstance(getattr(config, "num_attention_heads", None), list | tuple):
        raise OptimizationError(f"{type(config).__name__} has heads in each stage, which are not narrowed", hint=_OWN)
    stages = config.hidden_sizes
    changes: dict[str, Any] = {"hidden_sizes": type(stages)(_rounded(s, asked.width) for s in stages)}
    if isinstance(getattr(config, "embedding_size", None), int):
        changes["embedding_size"] = _rounded(config.embedding_size, asked.width)
    return Widths(None, None, 0, changes)


def _rounded(size: int, share: float) -> int:
    """A share of a size, in multiples of 8, which vector units like."""
    return min(size, max(_MULTIPLE, int(size * share / _MULTIPLE + 0.5) * _MULTIPLE))


def _with_weights(teacher: Any, student: Any, widths: Widths | None, changes: Mapping[str, Any]) -> Derived:
    """The student with the teacher's weights in it.

    Raises:
        OptimizationError: It has tensors whose place in the teacher is unknown.
    """
    theirs, ours = teacher.state_dict(), student.state_dict()
    sources = {name: source_name(name, teacher, student) for name in ours}
    missing = [name for name, source in sources.items() if source not in theirs]
    if missing:
        raise OptimizationError(
            f"{type(teacher).__name__}: the student's {missing[0]} has no place in the teacher", hint=_OWN
        )
    said = ", ".join(f"{name} {getattr(teacher.config, name)} -> {value}" for name, value in changes.items())
    changed = [name for name, tensor in ours.items() if tensor.shape != theirs[sources[name]].shape]
    if widths is not None and widths.hidden is None:
        note = f"the student ({said}) starts anew: which channels belong together is not known for such networks"
        return Derived(student, 0, 0, len(ours), (note,))
    if changed and widths is None:
        raise OptimizationError(
            f"{type(teacher).__name__}: with fewer layers {changed[0]} has another shape", hint=_OWN
        )
    made = {name: theirs[source].detach().clone() for name, source in sources.items()}
    if widths is not None:
        made = narrow(made, ours, sources, theirs, widths, _OWN)
    student.load_state_dict(made)
    note = f"the student ({said}) starts from the teacher: {len(ours) - len(changed)} tensors copied"
    note += f", {len(changed)} are parts of the teacher's" if changed else ""
    return Derived(student, len(ours) - len(changed), len(changed), 0, (note,))


def source_name(name: str, teacher: Any, student: Any) -> str:
    """Which of the teacher's tensors a student's tensor comes from: the same, in the layer that was taken.

    Lists of modules that are shorter in the student hold the layers that `evenly` took.
    """
    torch = require("torch", extra="train")
    lists = (torch.nn.ModuleList, torch.nn.Sequential)
    found: list[str] = []
    ours, theirs = student, teacher
    parts = name.split(".")
    for part in parts:
        place = part
        if re.fullmatch(r"\d+", part) and isinstance(ours, lists) and isinstance(theirs, lists):
            place = str(evenly(len(theirs), len(ours))[int(part)])
        found.append(place)
        ours, theirs = (getattr(m, p, None) for m, p in ((ours, part), (theirs, place)))
    return ".".join(found)
