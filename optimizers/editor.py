"""Changing a graph: who makes a tensor, who reads it, and what its constants are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.graphs import DEFAULT_DOMAINS, subgraphs
from deploykit.weights import is_external

if TYPE_CHECKING:
    import onnx

    from deploykit.specs import Array


class GraphEditor:
    """The main graph of a model, edited in place.

    Constants are expected to be initializers (`prepare` makes them so). What subgraphs read counts as read from
    outside: such tensors are never taken away.

    Args:
        model: Changed in place; `finish` puts its nodes back in order.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._nodes: list[onnx.NodeProto] = list(model.graph.node)
        self._weights = {w.name: w for w in model.graph.initializer}
        self._kept = {v.name for v in model.graph.output}
        self._taken = {v.name for v in model.graph.input} | set(self._weights) | self._kept
        self._makers: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self._shapes = {
            v.name: v.type.tensor_type for v in (*model.graph.input, *model.graph.value_info, *model.graph.output)
        }
        for node in self._nodes:
            self._note(node)
            self._kept |= set(_captured(node))
        self._taken |= set(self._makers)

    def _note(self, node: onnx.NodeProto) -> None:
        for name in node.output:
            self._makers[name] = node
        for name in node.input:
            if name and not any(node is r for r in self._readers[name]):
                self._readers[name].append(node)

    @property
    def nodes(self) -> tuple[onnx.NodeProto, ...]:
        """Nodes of the main graph as they are now; new ones at the end."""
        return tuple(self._nodes)

    @property
    def opset(self) -> int:
        """Version of the standard's operators."""
        return max((int(o.version) for o in self.model.opset_import if o.domain in DEFAULT_DOMAINS), default=0)

    def maker(self, name: str, op: str | None = None) -> onnx.NodeProto | None:
        """The node that makes a tensor; None where that is an input or constant, or another operator than ``op``."""
        node = self._makers.get(name)
        return node if node is not None and (op is None or is_op(node, op)) else None

    def readers(self, name: str) -> tuple[onnx.NodeProto, ...]:
        """Nodes of the main graph that read a tensor."""
        return tuple(self._readers.get(name, ()))

    def reader(self, name: str, op: str | None = None) -> onnx.NodeProto | None:
        """The only reader of a tensor that nobody else needs; None where there are others."""
        found = self._readers.get(name, [])
        if name in self._kept or len(found) != 1 or list(found[0].input).count(name) != 1:
            return None
        return found[0] if op is None or is_op(found[0], op) else None

    def kept(self, name: str) -> bool:
        """Whether a tensor is an output of the model, or read inside a branch or loop."""
        return name in self._kept

    def constant(self, name: str, limit: int = 1 << 28) -> Array | None:
        """The value of an initializer that is in memory and has no more than ``limit`` elements."""
        from onnx import numpy_helper

        weight = self._weights.get(name)
        if weight is None or is_external(weight) or int(np.prod(weight.dims, dtype=np.int64)) > limit:
            return None
        return numpy_helper.to_array(weight)

    def scalar(self, name: str) -> float | None:
        """The value of a constant with one element."""
        value = self.constant(name, 1)
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    def shape(self, name: str) -> list[int | str | None] | None:
        """Sizes, symbols, or None for what is unknown; None for an unknown rank."""
        if name in self._weights:
            return [int(d) for d in self._weights[name].dims]
        known = self._shapes.get(name)
        if known is None or not known.HasField("shape"):
            return None
        return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in known.shape.dim]

    def rank(self, name: str) -> int | None:
        """Number of axes, where it is known."""
        shape = self.shape(name)
        return None if shape is None else len(shape)

    def elem_type(self, name: str) -> int:
        """ONNX element type; 0 where it is unknown."""
        if name in self._weights:
            return int(self._weights[name].data_type)
        known = self._shapes.get(name)
        return int(known.elem_type) if known is not None else 0

    def add_constant(self, hint: str, value: Array) -> str:
        """Store a new initializer.

        Returns:
            Its name, new in the graph.
        """
        from onnx import numpy_helper

        name = self._fresh(hint)
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        self._weights[name] = self.model.graph.initializer[-1]
        return name

    def add(self, op: str, inputs: Sequence[str], hint: str, *, like: str | None = None, **attributes: Any) -> str:
        """Add a node with one output.

        Args:
            op: Operator of the standard.
            inputs: Its inputs.
            hint: What its output's name begins with.
            like: A tensor of the same type and shape.
            attributes: Of the node.

        Returns:
            The output's name, new in the graph.
        """
        from onnx import helper

        name = self._fresh(hint)
        node = helper.make_node(op, list(inputs), [name], name=f"{name}/{op}", **attributes)
        self._nodes.append(node)
        self._note(node)
        if like is not None and like in self._shapes:
            self._shapes[name] = self._shapes[like]
        return name

    def set_input(self, node: onnx.NodeProto, index: int, name: str) -> None:
        """Let a node read another tensor."""
        old = node.input[index]
        node.input[index] = name
        if old not in node.input:
            self._readers[old] = [r for r in self._readers[old] if r is not node]
        if not any(node is r for r in self._readers[name]):
            self._readers[name].append(node)

    def replace(self, old: str, new: str) -> bool:
        """Let all readers of a tensor read another one.

        Returns:
            Whether it could be done: an output of the model, and what a branch reads, keeps its name.
        """
        if old in self._kept:
            return False
        for node in self.readers(old):
            for index, name in enumerate(node.input):
                if name == old:
                    self.set_input(node, index, new)
        return True

    def finish(self) -> None:
        """Drop nodes and constants that nobody reads, and put the rest in an order that ONNX allows."""
        needed, waiting = set(self._kept), list(self._kept)
        while waiting:
            node = self._makers.get(waiting.pop())
            if node is None:
                continue
            for name in (*node.input, *_captured(node)):
                if name and name not in needed:
                    needed.add(name)
                    waiting.append(name)
        alive = [n for n in self._nodes if any(o in needed for o in n.output)]
        ordered = _sorted(alive)
        graph = self.model.graph
        del graph.node[:]
        graph.node.extend(ordered)
        made = {o for n in ordered for o in n.output}
        _drop(graph.initializer, needed)
        _drop(graph.value_info, made)

    def _fresh(self, hint: str) -> str:
        name, number = hint, 1
        while name in self._taken:
            number += 1
            name = f"{hint}_{number}"
        self._taken.add(name)
        return name


def is_op(node: onnx.NodeProto, *ops: str) -> bool:
    """Whether a node is one of these operators of the standard."""
    return node.op_type in ops and node.domain in DEFAULT_DOMAINS


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute."""
    from onnx import helper

    for found in node.attribute:
        if found.name == name:
            return helper.get_attribute_value(found)
    return default


def _drop(values: Any, kept: Set[str]) -> None:
    for index in range(len(values) - 1, -1, -1):
        if values[index].name not in kept:
            del values[index]


def _captured(node: onnx.NodeProto) -> Iterable[str]:
    """Names that the graphs inside a node read; those of their own tensors among them."""
    for _, graph in subgraphs(node):
        for inner in graph.node:
            yield from inner.input
            yield from _captured(inner)
        for output in graph.output:
            yield output.name


def _sorted(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Topological order that keeps the given one where it can."""
    makers = {o: i for i, n in enumerate(nodes) for o in n.output if o}
    waits = [{makers[x] for x in (*n.input, *_captured(n)) if x in makers} for n in nodes]
    done, ordered = [False] * len(nodes), []
    for start in range(len(nodes)):
        stack = [start]
        while stack:
            top = stack[-1]
            if done[top]:
                stack.pop()
                continue
            missing = sorted((i for i in waits[top] if not done[i] and i != top), reverse=True)
            if missing:
                stack += missing
                continue
            done[top] = True
            ordered.append(nodes[top])
            stack.pop()
    return ordered
