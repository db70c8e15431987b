"""An optimizer: one Transpose instead of two in a row, and none where they cancel out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.extras import version_of
from deploykit.modelfile import read_model, write_model
from deploykit.optimizers.base import StepResult


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """What may be merged.

    Attributes:
        remove_identity: Whether Identity nodes go too, those that are left of cancelled pairs among them.
        keep: Names of nodes that stay as they are.
    """

    remove_identity: bool = True
    keep: tuple[str, ...] = ()


class MergeTransposes:
    """What the entry point names; the numbers stay the same, bit by bit."""

    config = MergeConfig
    min_cosine = None

    def apply(self, model: Path, config: MergeConfig, target: Path) -> StepResult:
        """Merge, and write the result.

        Raises:
            ModelError: The file cannot be read.
        """
        proto = read_model(model)
        before = len(proto.graph.node)
        merged = _merge(proto.graph, config.keep)
        removed = _remove_identities(proto.graph, config.keep) if config.remove_identity else 0
        write_model(proto, target)
        params = {"nodes_before": before, "nodes_after": len(proto.graph.node), "merged": merged, "removed": removed}
        return StepResult(bool(merged or removed), (), params, {"onnx": version_of("onnx") or "unknown"})


def _merge(graph: Any, keep: tuple[str, ...]) -> int:
    """Give the second of two the product of both; the first goes where nobody else reads it."""
    producers = {name: node for node in graph.node for name in node.output}
    merged = 0
    for node in graph.node:  # in the order of the data: a third in a row finds the product of the first two
        first = producers.get(node.input[0]) if node.op_type == "Transpose" and not node.domain else None
        if first is None or first.op_type != "Transpose" or first.domain or {node.name, first.name} & {*keep}:
            continue
        inner, outer = _permutations(first, node)
        if not inner:
            continue
        product = [inner[axis] for axis in outer]
        node.input[0] = first.input[0]
        del node.attribute[:]
        if product == sorted(product):
            node.op_type = "Identity"
        else:
            from onnx import helper

            node.attribute.append(helper.make_attribute("perm", product))
        merged += 1
    _drop(graph, lambda node: node.op_type == "Transpose" and node.name not in keep)
    return merged


def _permutations(first: Any, second: Any) -> tuple[list[int], list[int]]:
    """Both permutations; without the attribute, axes are reversed. Empty where the rank is not known."""
    found = [next((list(a.ints) for a in node.attribute if a.name == "perm"), None) for node in (first, second)]
    rank = next((len(perm) for perm in found if perm is not None), 0)
    inner, outer = (list(reversed(range(rank))) if perm is None else perm for perm in found)
    return (inner, outer) if len(inner) == len(outer) else ([], [])


def _remove_identities(graph: Any, keep: tuple[str, ...]) -> int:
    """Let their readers read what they read; those that give the graph's outputs stay."""
    outputs = {value.name for value in graph.output}
    gone: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Identity" and not node.domain and node.output[0] not in outputs and node.name not in keep:
            gone[node.output[0]] = gone.get(node.input[0], node.input[0])
    for node in _all_nodes(graph):
        for i, name in enumerate(node.input):
            node.input[i] = gone.get(name, name)
    for inner in _subgraphs(graph):
        for value in inner.output:  # a branch may give a tensor from outside as it is
            value.name = gone.get(value.name, value.name)
    return _drop(graph, lambda node: node.op_type == "Identity" and node.output[0] in gone)


def _drop(graph: Any, may_go: Any) -> int:
    """Remove nodes that nobody reads; returns how many."""
    dropped = 0
    while True:
        reads = Counter(name for node in _all_nodes(graph) for name in node.input)
        reads.update(value.name for part in (graph, *_subgraphs(graph)) for value in part.output)
        dead = [node for node in graph.node if may_go(node) and not any(reads[name] for name in node.output)]
        if not dead:
            return dropped
        for node in dead:
            graph.node.remove(node)
        dropped += len(dead)


def _all_nodes(graph: Any) -> Iterator[Any]:
    for part in (graph, *_subgraphs(graph)):
        yield from part.node


def _subgraphs(graph: Any) -> Iterator[Any]:
    """Bodies of If, Loop and Scan, at any depth: they read tensors from outside by name."""
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield inner
                yield from _subgraphs(inner)


step = MergeTransposes()
