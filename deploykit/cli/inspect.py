"""`deploykit inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from deploykit.cli import common

_SHOWN_OPS = 12
_SHOWN_ROWS = 12
_LIST_LENGTH = 5


@click.command()
@click.argument("model", required=False)
@click.option("-m", "--model", "named", metavar="MODEL", help="Artifact directory, or a model file.")
@click.option("--diff", "other", metavar="MODEL", help="Show what another model has different.")
@common.dim_option
@common.contract_option
@click.option("--load/--no-load", default=None, help="Try the runtimes; by default for models below 1 GiB.")
@common.json_option
def command(
    model: str | None,
    named: str | None,
    other: str | None,
    dims: tuple[str, ...],
    contract: tuple[str, ...],
    load: bool | None,
    as_json: bool,
) -> None:
    """Show what a model is and costs: signature, operators, parameters, MACs, memory, quantization, runtimes.

    MODEL may stand without -m. With --for the exit code is 1 where the model breaks a contract. Dynamic dimensions have
    the sizes of --dim, else 1 for samples, 224 for images and 128 for all others.
    """
    path = named or model
    if path is None or (named and model):
        raise click.UsageError("Name one MODEL: deploykit inspect -m MODEL.")
    if other is not None and (contract or load):
        raise click.UsageError("--diff takes neither --for nor --load.")
    sizes = common.parse_dims(dims)
    if other is not None:
        from deploykit.diffing import diff_models

        difference = diff_models(path, other, dims=sizes)
        if as_json:
            common.show_json(difference)
        else:
            show_difference(difference)
        return
    from deploykit.inspecting import inspect_model

    found = inspect_model(path, dims=sizes, contract=contract, load=load)
    if as_json:
        common.show_json(found)
    else:
        show(found)
    if found["contract"]["violations"]:
        from deploykit.errors import ContractError

        first = found["contract"]["violations"][0]
        raise ContractError(
            f"{path} breaks the contract with {first['target']}: {_violations(len(found['contract']['violations']))}",
            expected="none",
            hint=first["hint"],
        )


def show(found: Mapping[str, Any]) -> None:
    """Print what `inspect_model` found, for a person."""
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in found["opsets"].items())
    ir = f", IR {found['ir_version']}" if found["ir_version"] else ""
    click.echo(f"{found['model']}: {found['format']}, {_bytes(found['files']['bytes'])}, opset {opsets}{ir}")
    if found["producer"]:
        _line("producer", found["producer"])
    if found["invalid"]:
        _line("INVALID", found["invalid"])
    for role in ("inputs", "outputs"):
        for value in found[role]:
            _line(role[:-1], _spec(value))
    _show_graph(found)
    _show_costs(found)
    for result in found["runtimes"]:
        version = f" {result['version']}" if result["version"] else ""
        verdict = {True: "loads", False: "does not load", None: ""}[result["loads"]]
        why = f": {result['reason']}" if verdict and result["reason"] else result["reason"] or ""
        _line("runtime", f"{result['device']}{version} {verdict}{why}")
    _show_contract(found["contract"])
    if found["artifact"]:
        for step in found["artifact"]["lineage"]:
            _line("step", f"{step['step']} ({step['seconds']} s)")
            for note in step["notes"]:
                _line("", f"note: {note}")
        for record in found["artifact"]["evidence"]["parity"]:
            _line("parity", common.parity_line(record))
        for title, text in common.evidence_lines(found["artifact"]["evidence"]):
            _line(title, text)


def _show_graph(found: Mapping[str, Any]) -> None:
    for axis in found["dynamic_axes"]:
        if axis["axis"] is None:
            _line("dynamic", f"{axis['tensor']}: its rank is not known")
    nodes = found["nodes"]
    inner = [f"{nodes[k]} in {k}" for k in ("subgraphs", "functions") if nodes[k]]
    ops = [f"{op} {count}" for op, count in nodes["by_op"].items()]
    rest = f", {len(ops) - _SHOWN_OPS} more operators" if len(ops) > _SHOWN_OPS else ""
    places = f" ({', '.join(inner)})" if inner else ""
    _line("nodes", f"{nodes['total']}{places}: {', '.join(ops[:_SHOWN_OPS])}{rest}")
    for op in found["custom_ops"]:
        _line("custom", f"{op['domain']}.{op['op']} {op['count']}")
    if found["files"]["external"]:
        _line("external", ", ".join(list(found["files"]["sizes"])[1:]))


def _show_costs(found: Mapping[str, Any]) -> None:
    parameters, compute, memory = found["parameters"], found["compute"], found["memory"]
    kinds = ", ".join(f"{name} {v['count']:,} ({_bytes(v['bytes'])})" for name, v in parameters["by_dtype"].items())
    shared = f"; {parameters['shared_tensors']} shared tensors count once" if parameters["shared_tensors"] else ""
    _line("params", f"{parameters['count']:,}: {kinds}{shared}" if kinds else "0")
    sizes = ", ".join(f"{name}={size}" for name, size in compute["sizes"].items())
    by_op = ", ".join(f"{op} {count:,}" for op, count in compute["by_op"].items())
    _line("macs", f"{compute['macs']:,}{' at ' + sizes if sizes else ''}{' (' + by_op + ')' if by_op else ''}")
    if compute["uncounted"]:
        shown = "; ".join(f"{u['node']} ({u['op']}): {u['reason']}" for u in compute["uncounted"][:_LIST_LENGTH])
        _line("", f"not counted: {len(compute['uncounted'])} of {compute['nodes']} nodes that compute: {shown}")
    if found["unshaped"]:
        shown = "; ".join(f"{u['node']}: {u['reason']}" for u in found["unshaped"][:_LIST_LENGTH])
        _line("", f"no shapes: {len(found['unshaped'])} nodes: {shown}")
    for note in compute["notes"][:_LIST_LENGTH]:
        _line("", f"note: {note}")
    if memory["peak_activation_bytes"] is not None:
        place = f"at node {memory['at_node']}" if memory["at_node"] else "at the inputs"
        unknown = f", {memory['unknown_tensors']} tensors of unknown size left out" if memory["unknown_tensors"] else ""
        _line(
            "memory",
            f"about {_bytes(memory['total_bytes'])}: weights {_bytes(memory['weight_bytes'])}, "
            f"activations {_bytes(memory['peak_activation_bytes'])} {place}{unknown}",
        )
    quantized = found["quantized"]
    if quantized and quantized["nodes"]["share"] is not None:
        parts = [
            f"{v['share']:.0%} of {what}" + (f" ({v['weight_only']:,} weight-only)" if v["weight_only"] else "")
            for what, v in quantized.items()
            if v["share"] is not None
        ]
        _line("8 bits", ", ".join(parts))


def _show_contract(contract: Mapping[str, Any]) -> None:
    broken = contract["violations"]
    for name in contract["targets"]:
        mine = [v for v in broken if v["target"] == name]
        _line("contract", f"{name}: {_violations(len(mine)) if mine else 'kept'}")
        for v in mine[:_SHOWN_ROWS]:
            op = f"{v['domain']}.{v['op']}" if v["domain"] else v["op"]
            since = f"-{v['since']}" if v["since"] else ""
            where = f"node {v['node']} ({op}{since}): " if v["node"] else ""
            _line("", f"{where}{v['reason']}; {v['hint']}")
        if len(mine) > _SHOWN_ROWS:
            _line("", f"and {len(mine) - _SHOWN_ROWS} more, see --json")
    for note in contract["notes"]:
        _line("", f"note: {note}")


def show_difference(found: Mapping[str, Any]) -> None:
    """Print what `diff_models` found, for a person."""
    a, b = found["a"], found["b"]
    for change in found["signature"]:
        _line(change["role"], f"{_side(change['a'])} -> {_side(change['b'])}")
    if not found["signature"]:
        _line("signature", "the same")
    rows = [["file", *_pair(found["files"]["bytes"], _bytes)]]
    rows += [
        ["opset " + (k or "ai.onnx"), _or_dash(v["a"], str), _or_dash(v["b"], str), ""]
        for k, v in found["opsets"].items()
    ]
    if a["ir_version"] != b["ir_version"]:
        rows.append(["IR version", _or_dash(a["ir_version"], str), _or_dash(b["ir_version"], str), ""])
    rows.append(["parameters", *_pair(found["parameters"]["count"], "{:,}".format)])
    rows += [["  " + k, *_pair(v, "{:,}".format)] for k, v in found["parameters_by_dtype"].items()]
    rows.append(["MACs", *_pair(found["macs"], "{:,}".format)])
    rows.append(["weights in memory", *_pair(found["memory"]["weight_bytes"], _bytes)])
    rows.append(["peak activations", *_pair(found["memory"]["peak_activation_bytes"], _bytes)])
    rows.append(["nodes", *_pair(_delta(a["nodes"]["total"], b["nodes"]["total"]), "{:,}".format)])
    rows += [["  " + k, *_pair(v, "{:,}".format)] for k, v in found["ops"].items()]
    common.show_table(["", str(a["model"]), str(b["model"]), "difference"], rows)
    weights = found["initializers"]
    if weights is None:
        _line("weights", "not compared: OpenVINO IR has no names for them")
        return
    _line(
        "weights",
        f"{weights['equal']} equal, {len(weights['changed'])} changed, {len(weights['only_a'])} only in the first, "
        f"{len(weights['only_b'])} only in the second",
    )
    if weights["changed"]:
        changed = [
            [r["name"], r["a"], r["b"] if r["b"] != r["a"] else "", _or_dash(r["max_abs"], "{:.3g}"),
             _or_dash(r["sqnr_db"], "{:.1f}")]
            for r in weights["changed"][:_SHOWN_ROWS]
        ]  # fmt: skip
        common.show_table(["weight", "first", "second", "max abs", "SQNR dB"], changed)
        if len(weights["changed"]) > _SHOWN_ROWS:
            _line("", f"and {len(weights['changed']) - _SHOWN_ROWS} more, see --json")


def _side(value: Any) -> str:
    if not value:
        return "not there"
    return _spec(value) if isinstance(value, dict) else ", ".join(value)


def _violations(count: int) -> str:
    return f"{count} violation{'s' if count > 1 else ''}"


def _delta(a: int, b: int) -> dict[str, int]:
    return {"a": a, "b": b, "delta": b - a}


def _pair(numbers: Mapping[str, Any], form: Any) -> list[str]:
    a, b, delta = numbers["a"], numbers["b"], numbers["delta"]
    sign = "" if not delta else ("+" if delta > 0 else "-") + form(abs(delta))
    return [_or_dash(a, form), _or_dash(b, form), sign or "="]


def _or_dash(value: Any, form: Any) -> str:
    return "-" if value is None else str(form.format(value) if isinstance(form, str) else form(value))


def _spec(value: Mapping[str, Any]) -> str:
    dims = "?" if value["shape"] is None else ", ".join(map(str, value["shape"]))
    return f"{value['name']}: {value['dtype']}[{dims}]"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _line(title: str, text: str) -> None:
    # Names in a model may hold anything, terminal escapes included.
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    click.echo(f"  {title:9} {safe}")
