"""A runtime's profile, folded to the layers of the file that it was made of.

A runtime fuses, renames and reorders, so a row of its profile says little to whoever wrote the model. Every executed
kernel is led back to the file's nodes: by the names that the runtime kept, by its weights, and from there against the
flow of data through the nodes that no kernel is named after, because those were fused into their readers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from deploykit.runtimes.placement import ExecutedNode, NodePlacement, is_compute

# Their time holds that of the nodes in their bodies, which the profile lists as well.
_CONTROL = ("If", "Loop", "Scan")


@dataclass(frozen=True, slots=True)
class SourceNode:
    """A node of the file.

    Attributes:
        name: Its name; for a nameless one, its first output.
        op: Operator type.
        inputs: Names of its tensors, "" for one left out.
        outputs: Likewise.
        macs: Multiply-accumulates of one run; 0 where it does none, or where they are not known.
        moved_bytes: Size of inputs, weights and outputs; 0 where not known.
        weights: Stored tensors that it multiplies with.
        weight_bytes: Their size in the file.
        compute: Whether it is a convolution, matrix product, recurrence or attention.
        quantized: Whether its weights are integers and its data come out of a DequantizeLinear: it is meant for an
            integer kernel.
        signed: Whether it is an operator on integers whose data are int8.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int = 0
    moved_bytes: int = 0
    weights: frozenset[str] = frozenset()
    weight_bytes: int = 0
    compute: bool = False
    quantized: bool = False
    signed: bool = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a runtime executed, and how long it took in one run.

    Attributes:
        name: The runtime's name.
        op: Operator type after fusion.
        on: Execution provider or device.
        precision: Element type that it computed in, "" where not known.
        time_us: Microseconds.
        moved_bytes: Size of inputs, weights and outputs; 0 where not known.
        weight_bytes: Of its weights, as far as the runtime lists them.
        sources: Names of the file's nodes, tensors and weights that it holds.
        nodes: Those of the file's nodes that were folded into it, in the file's order; set by `fold`.
    """

    name: str
    op: str
    on: str
    precision: str
    time_us: float
    moved_bytes: int = 0
    weight_bytes: int = 0
    sources: frozenset[str] = frozenset()
    nodes: tuple[SourceNode, ...] = ()

    @property
    def main(self) -> SourceNode | None:
        """The node that it is about: the dearest product, else the last node; None where it is the runtime's own."""
        products = [n for n in self.nodes if n.compute]
        return max(products, key=lambda n: n.macs) if products else self.nodes[-1] if self.nodes else None

    @property
    def label(self) -> str:
        """The name that whoever wrote the model knows."""
        return self.main.name if self.main is not None else self.name


@dataclass(frozen=True, slots=True)
class Layer:
    """The kernels that one node of the file became.

    Attributes:
        name: Of the node; of the kernel where the runtime added it by itself.
        op: Operator type of the node, likewise.
        kernels: The dearest first.
        macs: Multiply-accumulates of one run.
        moved_bytes: Size of what all its kernels read and wrote.
        own: Whether it is a node of the file.
    """

    name: str
    op: str
    kernels: tuple[Kernel, ...]
    macs: int
    moved_bytes: int
    own: bool

    @property
    def time_us(self) -> float:
        """Microseconds in one run."""
        return sum(k.time_us for k in self.kernels)

    @property
    def precision(self) -> str:
        """Of the dearest kernel."""
        return self.kernels[0].precision


@dataclass(frozen=True, slots=True)
class Profile:
    """One model's run, kernel by kernel.

    Attributes:
        device: As the user names it.
        asked: The provider or device that was asked for, as the runtime names it.
        kernels: In the order of their execution, with the nodes folded into them.
        layers: The same by source layer, the dearest first.
        total_us: Median of whole runs without the profiler.
        quick_us: Their first decile, which a busy neighbour does not reach.
        inputs: Names of the model's inputs.
        outputs: Of its outputs.
    """

    device: str
    asked: str
    kernels: tuple[Kernel, ...]
    layers: tuple[Layer, ...]
    total_us: float
    quick_us: float = 0.0
    inputs: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()

    @property
    def profiled_us(self) -> float:
        """Microseconds in all kernels."""
        return sum(k.time_us for k in self.kernels)

    @property
    def unattributed_us(self) -> float:
        """Microseconds in kernels that the runtime added by itself."""
        return sum(layer.time_us for layer in self.layers if not layer.own)

    def share(self, kernels: Iterable[Kernel]) -> float:
        """The part of the time in all kernels that some take, 0 to 1."""
        return sum(k.time_us for k in kernels) / self.profiled_us if self.profiled_us else 0.0


def join(placed: Sequence[NodePlacement], executed: Sequence[ExecutedNode]) -> list[Kernel]:
    """Times from the profile with sources from the executed graph.

    ONNX Runtime invents names for nameless nodes when it profiles, and saves them nameless: these are paired by their
    order among those of their operator type.
    """
    known = {node.name: node.sources for node in executed if node.name}
    spare: dict[str, list[frozenset[str]]] = defaultdict(list)
    for node in executed:
        if not node.name:
            spare[node.op].append(node.sources)
    lost: dict[str, list[str]] = defaultdict(list)
    for place in placed:
        if place.name not in known:
            lost[place.op].append(place.name)
    for op, names in lost.items():
        if len(names) == len(spare[op]):
            known |= dict(zip(names, spare[op], strict=True))
    found = [
        Kernel(
            p.name, p.op, p.on, p.precision, p.time_us, p.moved_bytes, p.weight_bytes, known.get(p.name, frozenset())
        )
        for p in placed
    ]
    return _without_bodies(found, {p.name for p in placed if p.name in known})


def _without_bodies(kernels: Sequence[Kernel], outer: set[str]) -> list[Kernel]:
    """Take the time of bodies out of the nodes that hold them."""
    controls = [k for k in kernels if k.op in _CONTROL and k.name in outer]
    if not controls:
        return list(kernels)
    inner = sum(k.time_us for k in kernels if k.name not in outer and k.op not in _CONTROL)
    whole = sum(k.time_us for k in controls)
    left = max(0.0, 1 - inner / whole) if whole else 0.0
    return [replace(k, time_us=k.time_us * left if k in controls else 0.0) if k.op in _CONTROL else k for k in kernels]


def fold(kernels: Sequence[Kernel], graph: Sequence[SourceNode]) -> tuple[list[Kernel], list[Layer]]:
    """Lead kernels back to the nodes of the file.

    Args:
        kernels: As `join` gives them.
        graph: The file's nodes, in its order.

    Returns:
        The kernels with their nodes, and the layers, the dearest first.
    """
    owner = _claim(kernels, graph)
    _follow_back(owner, kernels, graph)
    nodes: dict[int, list[int]] = defaultdict(list)
    for node, numbers in owner.items():
        for number in numbers:
            nodes[number].append(node)
    folded = [
        _with_packed_weights(replace(k, nodes=tuple(graph[n] for n in sorted(nodes[i])))) for i, k in enumerate(kernels)
    ]
    return folded, _layers(folded)


def _with_packed_weights(kernel: Kernel) -> Kernel:
    """Add weights that the runtime packed away when it loaded the model: they are read all the same."""
    stored = sum(n.weight_bytes for n in kernel.nodes) if is_compute(kernel.op) else 0
    if not kernel.moved_bytes or 2 * kernel.weight_bytes >= stored:
        return kernel
    return replace(kernel, moved_bytes=kernel.moved_bytes + stored - kernel.weight_bytes, weight_bytes=stored)


def _claim(kernels: Sequence[Kernel], graph: Sequence[SourceNode]) -> dict[int, list[int]]:
    """Kernels by the number of a node that they name; those that compute come first."""
    place: dict[str, int] = {}
    readers: dict[str, list[int]] = defaultdict(list)
    for number, node in enumerate(graph):
        for name in (node.name, *node.outputs):
            if name:
                place.setdefault(name, number)
        for weight in node.weights:
            readers[weight].append(number)
    owner: dict[int, list[int]] = defaultdict(list)
    order = sorted(range(len(kernels)), key=lambda i: not is_compute(kernels[i].op))
    for number in order:
        kernel = kernels[number]
        found = {place[name] for name in (kernel.name, *kernel.sources) if name in place}
        if is_compute(kernel.op):
            by_weight = {readers[name][0] for name in kernel.sources if len(readers.get(name, ())) == 1}
            found |= by_weight
        for place_of_node in found:
            owner[place_of_node].append(number)
    return owner


def _follow_back(owner: dict[int, list[int]], kernels: Sequence[Kernel], graph: Sequence[SourceNode]) -> None:
    """Give nodes that no kernel is named after to the kernel of their reader: they were fused into it."""
    readers: dict[str, list[int]] = defaultdict(list)
    for number, node in enumerate(graph):
        for name in node.inputs:
            readers[name].append(number)
    for number in range(len(graph) - 1, -1, -1):
        if number in owner:
            continue
        node = graph[number]
        behind = [k for name in node.outputs for reader in readers[name] for k in owner.get(reader, [])]
        if node.compute:
            # A product can only be in a kernel that computes.
            behind = [k for k in behind if is_compute(kernels[k].op)]
        if behind:
            owner[number] = behind[:1]


def _layers(kernels: Sequence[Kernel]) -> list[Layer]:
    groups: dict[tuple[str, bool], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[kernel.label, kernel.main is not None].append(kernel)
    counted: set[int] = set()
    found = []
    # Each product counts once, in the layer of the kernel that computes it.
    for (name, own), members in sorted(groups.items(), key=lambda g: not any(is_compute(k.op) for k in g[1])):
        nodes = {id(n): n for k in members for n in k.nodes}
        macs = sum(n.macs for key, n in nodes.items() if key not in counted)
        counted |= {key for key, n in nodes.items() if n.macs}
        ordered = tuple(sorted(members, key=lambda k: -k.time_us))
        main = ordered[0].main
        found.append(Layer(name, main.op if main else ordered[0].op, ordered, macs, _bytes(ordered), own))
    return sorted(found, key=lambda layer: -layer.time_us)


def _bytes(kernels: Sequence[Kernel]) -> int:
    """What the runtime says, else what the file's own node would move."""
    told = sum(k.moved_bytes for k in kernels)
    return told or sum({id(n): n.moved_bytes for k in kernels for n in k.nodes if n is k.main}.values())


def compute_us(kernels: Iterable[Kernel]) -> Mapping[str, float]:
    """Microseconds of kernels that compute, by precision."""
    found: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        if is_compute(kernel.op):
            found[kernel.precision] += kernel.time_us
    return dict(found)
