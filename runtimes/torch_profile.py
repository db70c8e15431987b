"""Which operators ran in PyTorch, where, and for how long: torch's profiler, read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

from deploykit.runtimes.placement import NodePlacement

_TYPES = {
    "float": "float32", "double": "float64", "c10::Half": "float16", "c10::BFloat16": "bfloat16", "bool": "bool",
    "signed char": "int8", "short": "int16", "int": "int32", "long int": "int64", "long": "int64",
    "unsigned char": "uint8",
}  # fmt: skip
# Operators that make no work for a device: another look at a tensor, or its memory.
_NO_WORK = frozenset({
    "view", "reshape", "t", "transpose", "permute", "expand", "as_strided", "slice", "select", "squeeze", "unsqueeze",
    "unbind", "split", "chunk", "narrow", "detach", "alias", "flatten", "unflatten", "empty", "empty_strided",
    "empty_like", "lift_fresh", "resolve_conj", "resolve_neg", "to", "contiguous", "numpy_T", "view_as",
})  # fmt: skip
# What the profiler calls the code that torch.compile made; its own time is that of the fused kernels.
_COMPILED = "CompiledFxGraph"


def profiled_nodes(torch: Any, run: Callable[[], Any], target: str, runs: int) -> tuple[NodePlacement, ...]:
    """Run under the profiler and list the outermost operators.

    Args:
        torch: The module.
        run: One run; it has been run before.
        target: "cpu", "cuda" or "cuda:1".
        runs: How many; a node's time is the median over them, where all have the same nodes.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = target != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    found: list[list[NodePlacement]] = []
    for _ in range(max(1, runs)):
        with profile(activities=activities, record_shapes=True, acc_events=True) as seen:
            run()
        found.append([_node(event, target, cuda) for event in _outermost(seen.events())])
    last = found[-1]
    if any([n.op for n in nodes] != [n.op for n in last] for nodes in found):
        return tuple(last)
    times = zip(*([n.time_us for n in nodes] for nodes in found), strict=True)
    return tuple(
        replace(node, name=f"{node.op}_{number}", time_us=median(micros))
        for number, (node, micros) in enumerate(zip(last, times, strict=True))
    )


def _outermost(events: Any) -> Iterator[Any]:
    for event in events:
        if str(event.device_type).rpartition(".")[2] != "CPU":
            continue  # kernels are counted with the operator that started them
        compiled = _COMPILED in event.name
        if (_is_operator(event) or compiled) and not any(_is_operator(parent) for parent in _parents(event)):
            yield event


def _is_operator(event: Any) -> bool:
    return "::" in event.name and " " not in event.name


def _parents(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


def _node(event: Any, target: str, cuda: bool) -> NodePlacement:
    compiled = _COMPILED in event.name
    op = "compiled" if compiled else event.name
    types = [t for t in event.input_dtypes if t in _TYPES] if hasattr(event, "input_dtypes") else []
    precision = _TYPES[types[0]] if types else ""
    if not cuda:
        return NodePlacement(op, op, target, precision, event.self_cpu_time_total if compiled else event.cpu_time_total)
    kernels = _kernel_us(event, within=not compiled)
    if kernels or compiled or op.partition("::")[2].rstrip("_") in _NO_WORK:
        return NodePlacement(op, op, target, precision, kernels)
    return NodePlacement(op, op, "cpu", precision, event.cpu_time_total)


def _kernel_us(event: Any, *, within: bool) -> float:
    """Time of the kernels that an operator started, with those of the operators in it."""
    own = float(sum(kernel.duration for kernel in event.kernels))
    if within:
        return own + sum(_kernel_us(child, within=True) for child in event.cpu_children)
    # Under a compiled graph, whatever is no operator of its own: kernels of triton.
    return own + sum(_kernel_us(c, within=False) for c in event.cpu_children if not _is_operator(c))
