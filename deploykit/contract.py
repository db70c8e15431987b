"""The target contract: what a model may hold so that a named runtime can run it, and which node breaks that.

A model keeps the contract when its IR version and opsets are not newer than the runtime reads, when every node's
operator exists there, and when nothing in it belongs to one kind of hardware or to somebody's own library. Operators
are looked up in the standard's schemas (`onnx.defs`); limits come from `targets.toml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.errors import ContractError, first_line
from deploykit.graphs import Located, element_bits, opsets_of, stored_tensors, subgraphs, type_name, walk
from deploykit.modelfile import external_files, read_model, write_model
from deploykit.targets import Target, first_with, has_operator, opset_limit, parse_targets

if TYPE_CHECKING:
    import onnx

# What runtimes write into the models that they optimize: bound to a memory layout, an instruction set or a device.
_BOUND_DOMAINS = {
    "com.microsoft.nchwc": "ONNX Runtime's blocked memory layout for one instruction set",
    "com.ms.internal.nhwc": "a memory layout inside ONNX Runtime",
    "com.microsoft.dml": "DirectML",
    "trt.plugins": "a TensorRT plugin",
    "com.microsoft.experimental": "an experiment of ONNX Runtime",
}
_BOUND_OPS = {
    "EPContext": "a graph that was compiled for one device",
    "NhwcConv": "a fusion for one memory layout",
    "NhwcFusedConv": "a fusion for one memory layout",
    "NhwcMaxPool": "a fusion for one memory layout",
    "FusedConv": "a fusion of ONNX Runtime's CPU and CUDA providers",
    "FusedGemm": "a fusion of ONNX Runtime's CPU provider",
    "FusedMatMulActivation": "a fusion of ONNX Runtime for DirectML",
    "GemmFastGelu": "a fusion of ONNX Runtime for ROCm",
    "Snpe": "a graph that was compiled for one device",
    "QuantizeWithOrder": "a kernel for one kind of GPU",
    "DequantizeWithOrder": "a kernel for one kind of GPU",
    **{
        f"QLinear{op}": "a fusion of ONNX Runtime's CPU provider"
        for op in (
            "Add", "AveragePool", "Concat", "Conv", "GlobalAveragePool", "LeakyRelu", "Mul", "ReduceMean", "Sigmoid",
            "Softmax", "Where",
        )
    },
    **{
        op: "a fusion of ONNX Runtime's CPU provider"
        for op in ("QGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM")
    },
    **{
        f"QOrdered{op}": "a kernel for one kind of GPU"
        for op in ("Attention", "Gelu", "LayerNormalization", "LongformerAttention", "MatMul")
    },
}  # fmt: skip
# IR version by element type: https://github.com/onnx/onnx/blob/main/docs/Versioning.md and onnx.proto.
_TYPE_IR = {
    "FLOAT8E4M3FN": 9, "FLOAT8E4M3FNUZ": 9, "FLOAT8E5M2": 9, "FLOAT8E5M2FNUZ": 9, "UINT4": 10, "INT4": 10,
    "FLOAT4E2M1": 11, "FLOAT8E8M0": 12, "UINT2": 13, "INT2": 13, "FLOAT6E2M3": 14, "FLOAT6E3M2": 14,
}  # fmt: skip
# Below, weights had to be listed as inputs; nothing here is ever written lower.
_LOWEST_IR = 4
_FUNCTIONS_IR = 8
_OVERLOADS_IR = 10
_STANDARD = ("", "ai.onnx.ml")
_CONTRIB = "com.microsoft"
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Violation:
    """One reason why a target cannot take a model.

    Attributes:
        target: "ort:1.18".
        kind: "ir_version", "opset", "operator", "domain", "hardware" or "type".
        node: The node and its place; None where the model as a whole is meant.
        op: Its operator.
        domain: Its operator's domain.
        since: Opset in which this form of the operator came; None where it has no such number.
        reason: What is wrong.
        hint: What to do.
    """

    target: str
    kind: str
    node: str | None
    op: str | None
    domain: str | None
    since: int | None
    reason: str
    hint: str

    def __str__(self) -> str:
        if self.node is None:
            return self.reason
        name = f"{self.domain}.{self.op}" if self.domain else str(self.op)
        return f"node {self.node} ({name}{'' if self.since is None else f'-{self.since}'}): {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready copy."""
        return asdict(self)


def violations(model: onnx.ModelProto, targets: Sequence[Target]) -> list[Violation]:
    """Everything in a model that a target cannot take."""
    found: list[Violation] = []
    for target in targets:
        found += _check_versions(model, target)
        found += _check_types(model, target)
        own = {(f.domain, f.name) for f in model.functions}
        for located in walk(model):
            if (located.node.domain, located.node.op_type) not in own:
                found += _check_node(located, target)
    return found


def refuse(found: Sequence[Violation], path: object) -> None:
    """Raise where there are violations, naming the first of them.

    Raises:
        ContractError: There are.
    """
    if not found:
        return
    # A node says more than a version number.
    order = sorted(found, key=lambda v: v.node is None)
    shown = "; ".join(f"{v.target}: {v}" for v in order[:_SHOWN])
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise ContractError(f"{path} breaks its target contract: {shown}{more}", hint=order[0].hint)


def contract_of(lineage: Iterable[Any], asked: Iterable[str] = ()) -> tuple[Target, ...]:
    """The contract that a model was made under, with what is asked for now; later steps keep what earlier ones had.

    Args:
        lineage: `StepRecord`s.
        asked: `--for`.

    Raises:
        ContractError: An unknown target.
    """
    kept: list[str] = []
    for step in lineage:
        kept += [str(name) for name in step.params.get("contract", [])]
    return parse_targets([*kept, *asked])


def conform(path: Path, targets: Sequence[Target]) -> list[str]:
    """Bring a written model within the contract where that changes no number, in place, and refuse it otherwise.

    The IR version is lowered where nothing in the model needs it. The opset is lowered too: by its number alone where
    no node's operator changed in between, else by ONNX's version converter. The caller has to compare the outputs
    afterwards.

    Returns:
        Notes about what was done.

    Raises:
        ContractError: A node breaks the contract.
    """
    if not targets:
        return []
    model = read_model(path, weights=False)
    refuse([v for v in violations(model, targets) if v.kind not in ("opset", "ir_version")], path.name)
    notes = [*_lower_opset(path, model, targets)]
    if notes:
        model = read_model(path, weights=False)
    wanted = min([t.ir_version for t in targets if t.ir_version is not None], default=None)
    if wanted is not None and model.ir_version > wanted >= needed_ir(model):
        notes.append(f"IR version lowered from {model.ir_version} to {wanted}, the newest that the target reads")
        model.ir_version = wanted
        _save(model, path)
    refuse(violations(model, targets), path.name)
    return notes


def why_not(path: Path, targets: Sequence[Target]) -> str | None:
    """Why a candidate breaks the contract, versions that `conform` would lower left aside; None where it does not."""
    found = [v for v in violations(read_model(path, weights=False), targets) if v.node is not None]
    return f"it breaks the contract with {found[0].target}: {found[0]}" if found else None


def needed_ir(model: onnx.ModelProto) -> int:
    """The lowest IR version that a model's contents allow."""
    found = [_LOWEST_IR, *(_type_ir(t) for _, t in _types(model))]
    if model.functions:
        found.append(_FUNCTIONS_IR)
    if any(f.overload for f in model.functions) or any(located.node.overload for located in walk(model)):
        found.append(_OVERLOADS_IR)
    return max(found)


def _save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model whose external weights were never loaded: the file changes, they stay."""
    if external_files(model):
        path.write_bytes(model.SerializeToString())
    else:
        write_model(model, path)


def _lower_opset(path: Path, model: onnx.ModelProto, targets: Sequence[Target]) -> list[str]:
    limit, have = opset_limit(targets), opsets_of(model).get("", 0)
    if limit is None or have <= limit:
        return []
    newer = [n for n in walk(model) if not n.domain and (_since(n) or 0) > limit]
    if not newer:
        for owner in (model, *model.functions):
            for entry in owner.opset_import:
                if entry.domain in ("", "ai.onnx"):
                    entry.version = min(entry.version, limit)
        _save(model, path)
        return [f"opset {have} written as {limit}: no operator in it changed in between"]
    if model.functions or external_files(model) or any(n.domain for n in walk(model)):
        return []
    from onnx import version_converter

    try:
        write_model(version_converter.convert_version(model, limit), path)
    except Exception as exc:
        first = newer[0]
        raise ContractError(
            f"opset {have} cannot be lowered to {limit} ({first_line(exc, 120)}), which node "
            f"{first.label} ({first.node.op_type}-{_since(first)}) needs",
            hint=f"export it again from its source with --opset {limit}",
        ) from exc
    return [f"opset converted from {have} to {limit}, the newest that the target reads"]


def _check_versions(model: onnx.ModelProto, target: Target) -> Iterator[Violation]:
    def about(kind: str, reason: str, hint: str) -> Violation:
        return Violation(target.name, kind, None, None, None, None, reason, hint)

    if target.ir_version is not None and model.ir_version > target.ir_version:
        lower = needed_ir(model) <= target.ir_version
        hint = f"lower it: deploykit export MODEL --for {target.name} -o DIR" if lower else "the element types need it"
        yield about("ir_version", f"IR version {model.ir_version} is newer than {target.ir_version}", hint)
    limits = {"": target.opset, "ai.onnx.ml": target.ml_opset}
    for domain, version in opsets_of(model).items():
        limit = limits.get(domain)
        if limit is not None and version > limit:
            name = domain or "ai.onnx"
            yield about(
                "opset", f"opset {version} of {name} is newer than {limit}",
                f"lower it: deploykit export MODEL --for {target.name} -o DIR, from the source with --opset {limit}",
            )  # fmt: skip


def _check_node(located: Located, target: Target) -> Iterator[Violation]:
    node, domain = located.node, located.domain

    def about(kind: str, reason: str, hint: str) -> Violation:
        return Violation(target.name, kind, located.label, node.op_type, domain, _since(located), reason, hint)

    bound = _BOUND_DOMAINS.get(domain) or (_BOUND_OPS.get(node.op_type) if domain == _CONTRIB else None)
    if bound:
        yield about("hardware", f"{bound}, which is tied to where it was made", "take the model before the runtime "
                    "optimized it; runtimes fuse again when they load it")  # fmt: skip
    elif domain not in (*_STANDARD, _CONTRIB):
        yield about("domain", f"{target} has no operators of {domain!r}", "express it with ONNX operators; a runtime "
                    "without its library cannot load it")  # fmt: skip
    elif not has_operator(target, node.op_type, domain):
        later = first_with(target, node.op_type, domain)
        hint = f"{later} has it" if later else "leave it out of the graph"
        yield about("operator", f"{target} does not know this operator", hint)
    elif domain in _STANDARD:
        limit, since = target.ml_opset if domain else target.opset, _since(located)
        if since is None:
            yield about("operator", f"opset {located.opsets.get(domain)} of the standard has no such operator",
                        "export it again from its source")  # fmt: skip
        elif limit is not None and since > limit:
            yield about("opset", f"this form came with opset {since}, and {target} reads {limit}",
                        f"export it again with --opset {limit}")  # fmt: skip


def _since(located: Located) -> int | None:
    """Opset in which the form of an operator came that holds at its place."""
    import onnx

    version = located.opsets.get(located.domain)
    if version is None or located.domain not in _STANDARD:
        return None
    try:
        found = onnx.defs.get_schema(located.node.op_type, max_inclusive_version=version, domain=located.domain)
    except onnx.defs.SchemaError:
        return None
    return int(found.since_version)


def _check_types(model: onnx.ModelProto, target: Target) -> Iterator[Violation]:
    if target.ir_version is None:
        return
    seen: set[int] = set()
    for name, kind in _types(model):
        if kind not in seen and _type_ir(kind) > target.ir_version:
            seen.add(kind)
            bits = element_bits(kind)
            reason = f"tensor {name!r} is {type_name(kind)}, which needs IR version {_type_ir(kind)}; {target} reads "
            yield Violation(
                target.name, "type", None, None, None, None, f"{reason}{target.ir_version}",
                f"quantize to 8 bits instead of {bits:g}" if bits < 8 else "use another element type",
            )  # fmt: skip


def _type_ir(kind: int) -> int:
    return _ir_by_number().get(kind, 0)


@cache
def _ir_by_number() -> dict[int, int]:
    import onnx

    # An older onnx package does not know the newest types, and cannot read a model that has them.
    return {getattr(onnx.TensorProto, n): v for n, v in _TYPE_IR.items() if hasattr(onnx.TensorProto, n)}


def _types(model: onnx.ModelProto) -> Iterator[tuple[str, int]]:
    """Element types in a model: of stored tensors, of declared values, and of what nodes are told to cast to."""
    for name, tensor in stored_tensors(model):
        yield name, tensor.data_type
    graphs = [model.graph]
    for located in walk(model):
        graphs += [g for _, g in subgraphs(located.node)]
        for attribute in located.node.attribute:
            if attribute.name in ("to", "output_dtype", "dtype") and not located.domain:
                yield located.node.output[0], attribute.i
    for graph in graphs:
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.name, value.type.tensor_type.elem_type
