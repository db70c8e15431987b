"""SavedModels: one signature of a directory that TensorFlow or Keras wrote."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from deploykit.errors import SourceError, first_line
from deploykit.exporters.base import ExportOptions, Source
from deploykit.exporters.tensorflow_graph import import_tensorflow
from deploykit.exporters.tensorflow_source import Callee, TensorFlowSource, declared, refuse_torch_options
from deploykit.extras import require

_DEFAULT = "serving_default"
# Functions of tables and other resources that loading runs.
_RUN_BY_LOADING = frozenset({"_create_resource", "_initialize", "_destroy_resource"})
# A graph is a program: these run Python of this process, or touch files.
_UNSAFE = frozenset(
    {"PyFunc", "PyFuncStateless", "EagerPyFunc", "ReadFile", "WriteFile", "MatchingFiles", "Save", "SaveV2", "PrintV2"}
)


def open_saved_model(path: Path, options: ExportOptions, signature: str = "") -> Source:
    """Load one signature.

    Args:
        path: The directory with saved_model.pb.
        options: What the user asked for.
        signature: Its name; by default `serving_default`, else the only one.

    Raises:
        SourceError: Damaged, without such a signature, with string inputs, or with operators that touch files.
    """
    refuse_torch_options(options)
    tf = import_tensorflow()
    try:
        loaded = _load(tf, path)
    except SourceError:
        raise
    except Exception as exc:
        raise SourceError(f"cannot read {path} ({first_line(exc)})", expected="a SavedModel directory") from exc
    label = f"{path}:{signature}" if signature else str(path)
    function = _choose(dict(loaded.signatures), signature, path)
    unsafe = sorted(_operators(function) & _UNSAFE)
    if unsafe:
        raise _unsafe(label, unsafe[0])
    takes = function.structured_input_signature[1]
    names = sorted(takes)
    outputs = sorted(function.structured_outputs)
    unranked = next((n for n in names if takes[n].shape.rank is None), None)
    if unranked:
        raise SourceError(
            f"the rank of input {unranked!r} of {label} is unknown", hint="save it with an input signature"
        )
    inputs = tuple(declared(n, takes[n].dtype.name, takes[n].shape.as_list(), label) for n in names)

    def call(*tensors: Any) -> list[Any]:
        # `loaded` is named so that its variables outlive this function: signatures hold them weakly.
        assert loaded is not None
        made = function(**dict(zip(names, tensors, strict=True)))
        return [made[name] for name in outputs]

    return TensorFlowSource(Callee(inputs, tuple(outputs), call), options, label, "savedmodel")


def _load(tf: Any, path: Path) -> Any:
    """What `tf.saved_model.load` gives, also where an optimizer was saved that this TensorFlow does not know.

    Keras up to 2.10 and TensorFlow 1 saved their optimizers with the model, the moments of the weights (`slots`) among
    them; to load those takes the optimizer's class, of which Keras 3 registers none. Inference reads no slot: without
    the entries that make them slots they load as variables.
    """
    protos = require("tensorflow.core.protobuf.saved_model_pb2", extra="tensorflow")
    saved = protos.SavedModel()
    file = path / "saved_model.pb"
    if file.is_file():
        saved.ParseFromString(file.read_bytes())
    code = sorted(_run_by_loading(saved) & _UNSAFE)
    if code:
        raise _unsafe(path, code[0])
    owners = [n for graph in saved.meta_graphs for n in graph.object_graph_def.nodes if n.slot_variables]
    if not owners:
        return tf.saved_model.load(str(path))
    for owner in owners:
        del owner.slot_variables[:]
    with tempfile.TemporaryDirectory(prefix="deploykit-saved-model-") as name:
        copy = Path(name)
        (copy / file.name).write_bytes(saved.SerializeToString())
        for other in path.iterdir():
            if other.name != file.name:
                (copy / other.name).symlink_to(other.resolve())
        return tf.saved_model.load(str(copy))


def _run_by_loading(saved: Any) -> set[str]:
    """Operators that run while TensorFlow loads a file, before anybody can look at it."""
    found: set[str] = set()
    for graph in saved.meta_graphs:
        functions = {function.signature.name: function for function in graph.graph_def.library.function}
        nodes = graph.object_graph_def.nodes
        if not nodes:  # TensorFlow 1: one graph, of which the operator that begins it is run
            found |= {node.op for node in graph.graph_def.node}
        left = [
            name
            for node in nodes
            for child in node.children
            if child.local_name in _RUN_BY_LOADING and child.node_id < len(nodes)
            for name in (
                *nodes[child.node_id].function.concrete_functions,
                nodes[child.node_id].bare_concrete_function.concrete_function_name,
            )
        ]
        seen: set[str] = set()
        while left:
            name = left.pop()
            if name in seen or name not in functions:
                continue
            seen.add(name)
            for node in functions[name].node_def:
                found.add(node.op)
                left.append(node.op)
                for value in node.attr.values():
                    left += [value.func.name, *(function.name for function in value.list.func)]
    return found


def _unsafe(label: object, operator: str) -> SourceError:
    return SourceError(
        f"{label} holds the operator {operator}, which runs Python or touches files", hint="export it without that"
    )


def _choose(signatures: dict[str, Any], wanted: str, path: Path) -> Any:
    if not signatures:
        raise SourceError(f"{path} has no signature", hint="save it with model.export(DIR), or with signatures=")
    name = wanted or (_DEFAULT if _DEFAULT in signatures else next(iter(signatures)) if len(signatures) == 1 else "")
    if name not in signatures:
        ask = f"one of {', '.join(f'{path}:{n}' for n in sorted(signatures))}"
        raise SourceError(f"{path} has no signature {name or _DEFAULT!r}", expected=ask)
    return signatures[name]


def _operators(function: Any) -> set[str]:
    graph = function.graph.as_graph_def()
    return {n.op for n in graph.node} | {n.op for f in graph.library.function for n in f.node_def}
