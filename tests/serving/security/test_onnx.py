"""ONNX files that somebody made to attack: one line each, and nothing outside their folder is opened."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.errors import DeploykitError, ModelError
from deploykit.modelfile import copy_model, read_model
from deploykit.models import load_model
from deploykit.onnx_wire import _BELOW, read_wire
from deploykit.runtimes import onnx_check, open_session


def external(location="../secret/w.bin", name="w", dims=(4,), **entries):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number, data, kind=2):
    body = varint(len(data)) + data if kind == 2 else data
    return varint(number << 3 | kind) + body


def plain_file(folder, name, size=16):
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(bytes(size))


# --- where external data may be said to be ---------------------------------------------------------------------------

LOCATIONS = {
    "nothing": "",
    "the folder": ".",
    "the parent": "..",
    "a blank": " ",
    "a parent's file": "../secret/w.bin",
    "down and up": "sub/../../secret/w.bin",
    "up at the end": "sub/..",
    "dots and slashes": ".//..//secret//w.bin",
    "a system file": "/etc/passwd",
    "a process": "/proc/self/environ",
    "a device": "/dev/zero",
    "two slashes": "//etc/passwd",
    "a home": "~/w.bin",
    "a variable": "$HOME/w.bin",
    "a URL": "file:///etc/passwd",
    "a web address": "http://127.0.0.1/w",
    "backslashes": "..\\secret\\w.bin",
    "a drive": "C:\\w.bin",
    "a share": "\\\\host\\share\\w.bin",
    "a zero byte": "w.bin\0",
    "a zero byte before": "\0w.bin",
    "escapes of a URL": "%2e%2e/secret/w.bin",
    "a terminal's escape": "\x1b[2Jw.bin",
    "right to left": "\u202ew.bin",
    "5000 letters": "w" * 5000,
    "5000 folders": "d/" * 5000 + "w",
    "a link": "link.bin",
    "a linked folder": "linked/w.bin",
    "a link to a link": "again.bin",
    "a hard link": "hard.bin",
    "a hard link below": "sub/hard.bin",
    "a link to itself": "loop.bin",
    "a dead link": "dead.bin",
    "a pipe": "pipe",
    "a socket": "socket",
    "a folder": "sub",
    "a file as a folder": "w.bin/w.bin",
    "the memory of a runtime": "*/_ORT_MEM_ADDR_/*",
    "its other mark": "*/_ORT_NATIVE_ENDIAN_MEM_ADDR_/*",
}
ENTRIES = {
    "beyond the end": {"length": "17"},
    "an offset beyond": {"offset": "17"},
    "both beyond": {"offset": "8", "length": "9"},
    "a negative offset": {"offset": "-1"},
    "a negative length": {"length": "-16"},
    "a fraction": {"length": "16.0"},
    "a word": {"length": "all"},
    "hexadecimal": {"length": "0x10"},
    "an underscore": {"length": "1_6"},
    "a blank before": {"length": " 16"},
    "a plus": {"offset": "+0"},
    "digits of another script": {"length": "\u0661\u0666"},
    "an exponent": {"length": "1e1"},
    "beyond 64 bits": {"offset": str(2**64)},
    "that wraps to 0": {"offset": str(2**64 - 16), "length": "16"},
    "5000 digits": {"offset": "9" * 5000},
    "an unknown entry": {"mode": "r+"},
    "a base path": {"basepath": "../secret"},
    "an attribute of Python": {"__class__": "x"},
}


def prepare(folder):
    outside = folder.parent / "secret" / "w.bin"
    plain_file(folder, "w.bin")
    (folder / "sub").mkdir()
    (folder / "link.bin").symlink_to(outside)
    (folder / "again.bin").symlink_to("link.bin")
    (folder / "linked").symlink_to(outside.parent)
    (folder / "loop.bin").symlink_to("loop.bin")
    (folder / "dead.bin").symlink_to("nothing")
    os.link(outside, folder / "hard.bin")
    os.link(outside, folder / "sub/hard.bin")
    os.mkfifo(folder / "pipe")
    os.mknod(folder / "socket", 0o140600)
    for mark in ("_ORT_MEM_ADDR_", "_ORT_NATIVE_ENDIAN_MEM_ADDR_"):
        plain_file(folder, f"*/{mark}/*")


def refused(path, monkeypatch):
    """The lines that a runtime's opening gives, with onnx installed and, as in a serving image, without."""
    lines = []
    for known in (True, False):
        monkeypatch.setattr(onnx_check, "available", lambda name, known=known: known)
        with pytest.raises(ModelError) as caught:
            open_session(path)
        lines.append(str(caught.value))
    assert all(line.isprintable() and len(line) < 2000 for line in lines)
    return lines


@pytest.mark.parametrize("location", LOCATIONS.values(), ids=LOCATIONS)
def test_location(secret, tmp_path, model, monkeypatch, location):
    prepare(tmp_path / "model")
    secret.touched()
    path = tmp_path / "model" / "m.onnx"
    path.write_bytes(model(weights=[external(location, length="16")]).SerializeToString())
    refused(path, monkeypatch)


@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
def test_entries(secret, tmp_path, model, monkeypatch, entries):
    plain_file(tmp_path / "model", "w.bin")
    path = tmp_path / "model" / "m.onnx"
    path.write_bytes(model(weights=[external("w.bin", **entries)]).SerializeToString())
    refused(path, monkeypatch)


@pytest.mark.parametrize("location", ["../secret/w.bin", "hard.bin", "linked/w.bin"])
def test_other_ways_in(secret, tmp_path, model, location):
    prepare(tmp_path / "model")
    secret.touched()
    path = tmp_path / "model" / "m.onnx"
    path.write_bytes(model(weights=[external(location, length="16")]).SerializeToString())
    target = tmp_path / "copy.onnx"
    for call in (
        lambda: open_session(path, "openvino:cpu"), lambda: read_model(path), lambda: load_model(path),
        lambda: copy_model(path, target),
    ):  # fmt: skip
        with pytest.raises(ModelError, match="external data"):
            call()
    assert not target.exists()


def test_what_is_right_is_opened(secret, tmp_path, model):
    """The watch sees what is opened, and the checks let good data pass: else all these tests would prove nothing."""
    plain_file(tmp_path / "model", "sub/w.bin", 32)
    path = tmp_path / "model" / "m.onnx"
    path.write_bytes(model(weights=[external("sub/w.bin", offset="16", length="16", checksum="0")]).SerializeToString())
    assert read_wire(path).external == (
        ("w", {"location": "sub/w.bin", "offset": "16", "length": "16", "checksum": "0"}),
    )
    for device in ("ort:cpu", "openvino:cpu"):
        with open_session(path, device):
            pass
    (secret.path / "w.bin").read_bytes()
    assert "w.bin" in secret.touched()


# --- where in a file a tensor may hide -------------------------------------------------------------------------------


def constant(**attribute):
    return helper.make_node("Constant", [], ["c"], **attribute)


def graph_of(*tensors):
    return helper.make_graph([], "inner", [], [], list(tensors))


def in_attribute(model):
    return model([constant(value=external()), helper.make_node("Add", ["x", "c"], ["y"])], [])


def in_attributes(model):
    return model([helper.make_node("Identity", ["x"], ["y"], hidden=[external(), external()])], [])


def in_branch(model):
    return model([helper.make_node("If", ["x"], ["y"], then_branch=graph_of(external()), else_branch=graph_of())], [])


def in_deep_branch(model):
    inner = graph_of(external())
    for _ in range(10):
        inner = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=inner)], "deep", [], [])
    return model([helper.make_node("If", ["x"], ["y"], then_branch=inner)], [])


def in_graphs(model):
    return model([helper.make_node("Identity", ["x"], ["y"], all=[graph_of(), graph_of(external())])], [])


def in_sparse(part):
    def make(model):
        made = model()
        sparse = made.graph.sparse_initializer.add(dims=[4])
        sparse.values.CopyFrom(numpy_helper.from_array(np.ones(4, "f"), "s"))
        sparse.indices.CopyFrom(numpy_helper.from_array(np.arange(4), "i"))
        getattr(sparse, part).CopyFrom(external(name="s"))
        return made

    return make


def in_function(model):
    made = model()
    made.functions.add(name="f", domain="d").node.append(constant(value=external()))
    return made


def in_default(model):
    made = model()
    made.functions.add(name="f", domain="d").attribute_proto.append(helper.make_attribute("a", external()))
    return made


def in_training(model):
    made = model()
    made.training_info.add().algorithm.CopyFrom(graph_of(external()))
    return made


PLACES = {
    "an attribute": in_attribute, "a list of attributes": in_attributes, "a branch": in_branch,
    "a branch ten deep": in_deep_branch, "a list of graphs": in_graphs, "sparse values": in_sparse("values"),
    "sparse indices": in_sparse("indices"), "a function": in_function, "a function's default": in_default,
    "training": in_training,
}  # fmt: skip


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
def test_place(secret, tmp_path, model, monkeypatch, make):
    path = tmp_path / "model" / "m.onnx"
    path.write_bytes(make(model).SerializeToString())
    for line in refused(path, monkeypatch):
        assert "leaves the model's folder" in line


def test_the_walk_knows_every_message():
    """Every message that leads to tensors in the installed onnx is walked by the check without onnx."""
    types = dict(onnx.ModelProto.DESCRIPTOR.file.message_types_by_name)
    leading = {"TensorProto"}
    while True:
        more = {n for n, m in types.items() if any(f.message_type and f.message_type.name in leading for f in m.fields)}
        if more <= leading:
            break
        leading |= more
    wanted = {
        name: {f.number for f in types[name].fields if f.message_type and f.message_type.name in leading}
        for name in leading - {"TensorProto"}
    }
    assert {name: set(fields) for name, fields in _BELOW.items()} == wanted


# --- bytes that parsers could read differently, and bytes that are no model ------------------------------------------


def raw_tensor(*parts):
    """A model whose tensor is made of the parts."""
    body = b"".join((field(1, varint(4), 0), field(2, varint(1), 0), field(8, b"w"), *parts))
    return lambda model: model(weights=[]).SerializeToString() + field(7, field(5, body))


LOCATED = field(13, field(1, b"location") + field(2, b"../secret/w.bin"))


def cut(share):
    return lambda model: model().SerializeToString()[: int(len(model().SerializeToString()) * share)]


def deep(levels):
    def make(model):
        inner = b""
        for _ in range(levels):
            inner = field(1, field(4, b"If") + field(5, field(6, inner)))
        return model().SerializeToString() + field(25, field(7, field(5, field(6, inner))))

    return make


def dims(*sizes, data=b"", kind=1):
    return lambda model: model(
        weights=[TensorProto(name="w", data_type=kind, dims=sizes, raw_data=data)]
    ).SerializeToString()


def changed(change):
    def make(model):
        made = model()
        change(made)
        return made.SerializeToString()

    return make


def rename(made):
    made.graph.node[0].op_type = "\x1b[31mAdd\n\x00"


BYTES = {
    "nothing": lambda model: b"",
    "a byte": lambda model: b"\0",
    "zeros": lambda model: bytes(4096),
    "ones": lambda model: b"\xff" * 4096,
    "a text": lambda model: b"hello, I am a model\n" * 10,
    "JSON": lambda model: b'{"graph": {}}',
    "a zip": lambda model: b"PK\x05\x06" + bytes(18),
    "a pickle": lambda model: b"\x80\x04\x95\x0a\x00\x00\x00\x8c\x02os\x94.",
    "HDF5": lambda model: b"\x89HDF\r\n\x1a\n" + bytes(64),
    "ORT's own format": lambda model: b"\x20\0\0\0ORTM" + bytes(64),
    "a quarter": cut(0.25),
    "a half": cut(0.5),
    "nine tenths": cut(0.9),
    "all but a byte": lambda model: model().SerializeToString()[:-1],
    "a length beyond the end": lambda model: b"\x3a\xff\xff\xff\x7f",
    "a length of 64 bits": lambda model: b"\x3a" + b"\xff" * 9 + b"\x01",
    "a number without an end": lambda model: b"\x08" + b"\x80" * 20,
    "field 0": lambda model: b"\x02\0",
    "a group": lambda model: b"\x0b\x0c",
    "an end without a group": lambda model: b"\x3c",
    "wire type 7": lambda model: b"\x3f\0",
    "two graphs": lambda model: model().SerializeToString() * 2,
    "a tensor in two parts": lambda model: (
        model().SerializeToString() + field(7, field(1, field(5, field(5, field(14, b"\1", 0)) + field(5, LOCATED))))
    ),
    "elsewhere, by 64 bits": raw_tensor(field(14, varint(2**32 + 1), 0), LOCATED),
    "elsewhere, by a long 1": raw_tensor(field(14, b"\x81\x80\x80\x00", 0), LOCATED),
    "elsewhere, and then not": raw_tensor(field(14, b"\1", 0), LOCATED, field(14, b"\0", 0)),
    "a location twice": raw_tensor(field(14, b"\1", 0), LOCATED, LOCATED),
    "a key in two parts": raw_tensor(
        field(14, b"\1", 0), field(13, field(2, b"../secret/w.bin") + field(1, b"x") + field(1, b"location"))
    ),
    "a location that is no text": raw_tensor(
        field(14, b"\1", 0), field(13, field(1, b"location") + field(2, b"\xff/w.bin"))
    ),
    "no location": raw_tensor(field(14, b"\1", 0)),
    "messages 60 deep": deep(60),
    "messages 2000 deep": deep(2000),
    "2**40 values of nothing": dims(2**40),
    "2**40 values of 4 bytes": dims(2**40, data=b"abcd"),
    "dimensions that wrap": dims(2**32, 2**32, data=b"abcd"),
    "2**63 - 1 values": dims(2**63 - 1, data=b"abcd"),
    "negative dimensions": dims(-4, data=bytes(16)),
    "two of them": dims(-2, -2, data=bytes(16)),
    "a byte too few": dims(4, data=bytes(15)),
    "no such type": dims(4, data=bytes(16), kind=99),
    "no type": dims(4, data=bytes(16), kind=0),
    "a type below 0": dims(4, data=bytes(16), kind=-1),
    "strings in bytes": dims(4, data=bytes(16), kind=TensorProto.STRING),
    "an operator that there is not": changed(lambda m: setattr(m.graph.node[0], "op_type", "Hack")),
    "a name that is no text": changed(rename),
    "an operator of somebody": changed(lambda m: setattr(m.graph.node[0], "domain", "evil.ops")),
    "a compiled node": changed(lambda m: setattr(m.graph.node[0], "op_type", "EPContext")),
    "a cycle": changed(lambda m: m.graph.node[0].input.__setitem__(1, "y")),
    "a missing input": changed(lambda m: m.graph.node[0].input.__setitem__(1, "?")),
    "no graph": changed(lambda m: m.ClearField("graph")),
    "no opset": changed(lambda m: m.ClearField("opset_import")),
    "an opset to come": changed(lambda m: setattr(m.opset_import[0], "version", 2**40)),
    "a version to come": changed(lambda m: setattr(m, "ir_version", 2**40)),
    "an input twice": changed(lambda m: m.graph.input.append(m.graph.input[0])),
    "an output twice": changed(lambda m: m.graph.node.append(m.graph.node[0])),
    "10000 attributes": changed(lambda m: m.graph.node[0].attribute.extend([helper.make_attribute("axis", 1)] * 10000)),
    "a sequence as input": changed(lambda m: m.graph.input[0].type.sequence_type.elem_type.tensor_type.SetInParent()),
}


@pytest.mark.parametrize("make", BYTES.values(), ids=BYTES)
def test_bytes(secret, tmp_path, model, monkeypatch, make):
    path = tmp_path / "model" / "m.onnx"
    path.write_bytes(make(model))
    for known in (True, False):
        monkeypatch.setattr(onnx_check, "available", lambda name, known=known: known)
        with pytest.raises(DeploykitError) as caught:
            open_session(path)
        line = str(caught.value)
        assert line.isprintable() and len(line) < 2000
