"""Archives, manifests, settings and recipes that somebody made to attack: one line each."""

from __future__ import annotations

import io
import json
import os
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest

from deploykit.archives import unsafe_archive
from deploykit.artifact import Artifact, Evidence, write_golden
from deploykit.errors import ArtifactError, DataError, DeploykitError, RecipeError, SourceError
from deploykit.exporters.base import check_archive
from deploykit.optimizers.calibration import Calibration
from deploykit.recipe import Recipe
from deploykit.runtimes import RuntimeSettings, load, open_session
from deploykit.serving.loaded import Options, Source
from deploykit.serving.loaded import load as load_served
from deploykit.specs import Signature, TensorSpec
from deploykit.staging import ArtifactWriter

X = Signature((TensorSpec("x", "float32", (4,)),), (TensorSpec("y", "float32", (4,)),))


def header(shape, descr="<f4"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def member(name, data=b"", mode=0, flags=0):
    info = zipfile.ZipInfo(name)
    info.filename = name  # the constructor would mend it
    info.external_attr = mode << 16
    info.flag_bits = flags
    return info, data


def zipped(*members, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for info, data in members:
            archive.writestr(info, data, compression)
    return stream.getvalue()


def bomb(name):
    return lambda: zipped(member(name, header((2**23,)) + bytes(2**25)), compression=zipfile.ZIP_DEFLATED)


def claims_size():
    """An archive whose directory claims members of sizes that are not there."""
    data = bytearray(zipped(member("a", b"x" * 64)))
    at = data.rindex(b"PK\x01\x02") + 24
    data[at : at + 4] = (2**32 - 2).to_bytes(4, "little")
    return bytes(data)


LINK, PIPE, DEVICE = stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o666, stat.S_IFBLK | 0o666
ARCHIVES = {
    "nothing": lambda: b"",
    "no archive": lambda: b"hello" * 100,
    "cut short": lambda: zipped(member("a", b"x" * 100))[:-10],
    "a name that climbs": lambda: zipped(member("../evil", b"x")),
    "a name that climbs later": lambda: zipped(member("a/../../evil", b"x")),
    "an absolute name": lambda: zipped(member("/tmp/evil", b"x")),
    "a name with a backslash": lambda: zipped(member("..\\evil", b"x")),
    "a name with a drive": lambda: zipped(member("C:/evil", b"x")),
    "no name": lambda: zipped(member("", b"x")),
    "a link": lambda: zipped(member("a", b"/etc/passwd", LINK)),
    "a link to a folder": lambda: zipped(member("a", b"..", LINK), member("a/evil", b"x")),
    "a pipe": lambda: zipped(member("a", b"", PIPE)),
    "a device": lambda: zipped(member("a", b"", DEVICE)),
    "a name twice": lambda: zipped(member("a", b"x"), member("a", b"y")),
    "a bomb": bomb("a"),
    "a size that is not there": claims_size,
    "too many members": lambda: zipped(*(member(str(i)) for i in range(1001))),
}
GOLDEN = {
    "2**60 values": lambda: zipped(member("0/in/x.npy", header((2**60,)))),
    "2**42 values": lambda: zipped(member("0/in/x.npy", header((2**42,)))),
    "a size that wraps": lambda: zipped(member("0/in/x.npy", header((2**31, 2**33)))),
    "a size beyond 64 bits": lambda: zipped(member("0/in/x.npy", header((2**63, 2)))),
    "a negative size": lambda: zipped(member("0/in/x.npy", header((-1,)))),
    "a pickle": lambda: zipped(member("0/in/x.npy", header((1,), "|O") + b"\x80\x04cos\nsystem\n.")),
    "a pickle without a header": lambda: zipped(member("0/in/x.npy", b"\x80\x04cos\nsystem\n.")),
    "a header of brackets": lambda: zipped(member("0/in/x.npy", b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535)),
    "a header of 2 GB": lambda: zipped(member("0/in/x.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"(" * 99)),
    "a header that is code": lambda: zipped(member("0/in/x.npy", b"\x93NUMPY\x01\x00\x10\x00__import__('os')")),
    "no array": lambda: zipped(member("0/in/x", b"hello")),
    "a case of 5000 digits": lambda: zipped(member("9" * 5000 + "/in/x.npy", header((1,)) + b"abcd")),
    "another name": lambda: zipped(member("x.npy", header((1,)) + b"abcd")),
    "a name twice": lambda: zipped(*[member("0/in/x.npy", header((1,)) + b"abcd")] * 2),
    "a bomb": bomb("0/in/x.npy"),
    "an encrypted member": lambda: zipped(member("0/in/x.npy", header((1,)) + b"abcd")).replace(
        b"\x14\0\0\0\0\0", b"\x14\0\1\0\0\0"
    ),
    "cut short": lambda: zipped(member("0/in/x.npy", header((4,)) + b"abcd")),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("make", ARCHIVES.values(), ids=ARCHIVES)
def test_archive(tmp_path, make, monkeypatch):
    monkeypatch.setattr("deploykit.archives.FREE_BYTES", 2**20)
    monkeypatch.setattr("deploykit.archives.MEMBERS", 1000)
    path = tmp_path / "a.keras"
    path.write_bytes(make())
    with pytest.raises(SourceError) as caught:
        check_archive(path, "somebody")
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == [path]


def test_usual_archives(tmp_path):
    path = tmp_path / "a.zip"
    folder = member("a/", mode=stat.S_IFDIR | 0o755)
    path.write_bytes(
        zipped(folder, member("a/b", bytes(2**20), stat.S_IFREG | 0o644), compression=zipfile.ZIP_DEFLATED)
    )
    assert unsafe_archive(path) == ""


@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("make", GOLDEN.values(), ids=GOLDEN)
def test_golden(tmp_path, model, make, monkeypatch):
    monkeypatch.setattr("deploykit.archives.FREE_BYTES", 2**20)
    artifact = written(tmp_path / "a", model, golden=make())
    with pytest.raises(DataError) as caught:
        artifact.golden()
    assert str(caught.value).isprintable()
    with pytest.raises(DataError):
        Calibration.load(artifact.path / "golden.npz")


def written(path, model, golden=None, settings=None, change=lambda folder: None):
    """An artifact whose hashes are right: whoever made it meant it so."""
    with ArtifactWriter(path) as writer:
        (writer.dir / "model.onnx").write_bytes(model().SerializeToString())
        if golden is None:
            write_golden(writer.dir / "golden.npz", [({"x": np.ones(4, "f")}, {"y": np.ones(4, "f")})])
        else:
            (writer.dir / "golden.npz").write_bytes(golden)
        if settings is not None:
            (writer.dir / "settings.json").write_bytes(settings)
        change(writer.dir)
        return writer.commit(model="model.onnx", signature=X, lineage=[], evidence=Evidence())


# --- settings that an artifact brings --------------------------------------------------------------------------------


def settings(device="ort:cpu", **found):
    return json.dumps({"schema_version": 1, "device": device, **found}).encode()


BROUGHT = {
    "nothing": b"",
    "no JSON": b"{",
    "lists 200000 deep": b"[" * 200_000,
    "a number of 5000 digits": settings()[:-1] + b', "threads": ' + b"9" * 5000 + b"}",
    "2 MB": settings() + b" " * 2**21,
    "no UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "no device": b'{"schema_version": 1}',
    "a device of code": settings("../../evil:cpu"),
    "threads beyond all": settings(threads=10**40),
    "no threads": settings(threads=0),
    "true threads": settings(threads=True),
    "2**30 sessions": settings(sessions=2**30),
    "an unknown entry": settings(code="import os"),
    "another schema": settings(schema_version=2),
    "settings that are a list": settings(settings=["a"]),
    "a context that is written": settings(settings={"ep.context_enable": "1", "ep.context_file_path": "evil.onnx"}),
    "weights that are written": settings(settings={"session.optimized_model_external_initializers_file_name": "evil"}),
    "a cache": settings("openvino:cpu", settings={"CACHE_DIR": "evil"}),
    "a cache of a device below": settings(
        "openvino:auto", settings={"DEVICE_PROPERTIES": {"CPU": {"CACHE_DIR": "evil"}}}
    ),
    "a cache in JSON in JSON": settings("ort:openvino", settings={"load_config": '{"CPU": {"CACHE_DIR": "evil"}}'}),
    "a file of settings": settings("ort:openvino", settings={"load_config": "evil.json"}),
    "plugins of TensorRT": settings("ort:tensorrt", settings={"trt_extra_plugin_lib_paths": "evil.so"}),
    "an engine of TensorRT": settings("ort:tensorrt", settings={"trt_engine_cache_path": "evil"}),
    "a backend": settings("ort:qnn", settings={"backend_path": "evil.so"}),
    "a path under any name": settings(settings={"session.intra_op_thread_affinities": "/etc/passwd"}),
}


@pytest.mark.parametrize("found", BROUGHT.values(), ids=BROUGHT)
def test_settings_of_an_artifact(tmp_path, model, found, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a", model, settings=found)
    for call in (lambda: load(tmp_path / "a"), lambda: load_served(Source.at(tmp_path / "a"), Options())):
        with pytest.raises(DeploykitError) as caught:
            call()
        assert str(caught.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_libraries_are_off(tmp_path, model):
    """Also where the user names them: there is nothing that would check what is in them."""
    (tmp_path / "m.onnx").write_bytes(model().SerializeToString())
    with pytest.raises(DeploykitError, match="native code"):
        open_session(tmp_path / "m.onnx", settings={"trt_extra_plugin_lib_paths": "evil.so"})


def test_plain_settings_are_taken(tmp_path, model):
    brought = settings(settings={"session.intra_op.allow_spinning": "0", "execution_mode": "sequential"})
    written(tmp_path / "a", model, settings=brought)
    assert load_served(Source.at(tmp_path / "a"), Options()).settings.settings["execution_mode"] == "sequential"
    with load(tmp_path / "a") as session:
        assert session.run({"x": np.ones(4, "f")})["y"].tolist() == [1, 2, 3, 4]


# --- manifests and recipes -------------------------------------------------------------------------------------------


def edited(change):
    def make(root):
        found = json.loads((root / "manifest.json").read_bytes())
        change(found)
        (root / "manifest.json").write_text(json.dumps(found))

    return make


def replaced(data):
    return lambda root: (root / "manifest.json").write_bytes(data)


def listed(name):
    entry = {"sha256": "0" * 64, "bytes": 1}
    return edited(lambda found: found["files"].__setitem__(name, entry))


def swapped(kind):
    def make(root):
        place = root / "model.onnx"
        place.rename(root.parent / "outside.onnx")
        if kind == "link":
            place.symlink_to(root.parent / "outside.onnx")
        elif kind == "pipe":
            os.mkfifo(place)
        else:
            place.mkdir()

    return make


MANIFESTS = {
    "nothing": replaced(b""),
    "a list": replaced(b"[]"),
    "lists 100000 deep": replaced(b"[" * 100_000),
    "objects 100000 deep": replaced(b'{"a":' * 100_000),
    "17 MB": replaced(b" " * (17 * 2**20)),
    "no UTF-8": replaced(b"\xff"),
    "a number of 5000 digits": replaced(b'{"schema_version": ' + b"9" * 5000 + b"}"),
    "another schema": edited(lambda found: found.update(schema_version=99)),
    "true for 1": edited(lambda found: found.update(schema_version="1")),
    "an unknown entry": edited(lambda found: found.update(code="x")),
    "no files": edited(lambda found: found.update(files={})),
    "a file above": listed("../outside"),
    "an absolute file": listed("/etc/passwd"),
    "a file of no name": listed(""),
    "a zero byte": listed("a\0b"),
    "a surrogate": listed("\ud800"),
    "a model above": edited(lambda found: found.update(model="../outside.onnx")),
    "an absolute model": edited(lambda found: found.update(model="/etc/passwd")),
    "another sha256": edited(lambda found: found["files"]["model.onnx"].update(sha256="0" * 64)),
    "no sha256": edited(lambda found: found["files"]["model.onnx"].update(sha256="")),
    "another size": edited(lambda found: found["files"]["model.onnx"].update(bytes=1)),
    "a shape of text": edited(lambda found: found["inputs"][0].update(shape="x")),
    "a file more": lambda root: (root / "evil.so").write_bytes(b"x"),
    "a file less": lambda root: (root / "golden.npz").unlink(),
    "a link": swapped("link"),
    "a pipe": swapped("pipe"),
    "a folder": swapped("folder"),
    "a linked folder": lambda root: (root / "assets").symlink_to("/etc"),
    "a changed byte": lambda root: (root / "model.onnx").write_bytes(b"\0" + (root / "model.onnx").read_bytes()[1:]),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_manifest(tmp_path, model, change):
    root = written(tmp_path / "a", model).path
    change(root)
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(root)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000
    with pytest.raises(DeploykitError):
        load_served(Source.at(root), Options())


RECIPES = {
    "no TOML": b"[",
    "no UTF-8": b"\xff",
    "lists 50000 deep": b"a = " + b"[" * 50_000,
    "tables 50000 deep": b"a = " + b"{a=" * 50_000,
    "a name 30000 deep": b"a." * 30_000 + b"a = 1",
    "a number of 5000 digits": b"[export]\nsource = " + b"9" * 5000,
    "2 MB": b"#" * 2**21,
    "nothing": b"",
    "no step": b"[a]\nsource = 'x'",
    "an unknown step": b"[shell]\ncommand = 'rm'",
    "a name that climbs": b'["../evil"]\nstep = "export"\nsource = "x"',
    "an absolute name": b'["/tmp/evil"]\nstep = "export"\nsource = "x"',
    "an endless time": b"[export]\nsource = 'x'\ntimeout_s = inf",
    "an unknown option": b"[export]\nsource = 'x'\nshell = 'y'",
}


@pytest.mark.parametrize("data", RECIPES.values(), ids=RECIPES)
def test_recipe(tmp_path, data):
    path = tmp_path / "r.toml"
    path.write_bytes(data)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert str(caught.value).isprintable()


# --- files that are swapped between the check and the use ------------------------------------------------------------


def swap(path: Path, data: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(data)
    other.rename(path)


WRITES = {"another file": swap, "the same file": Path.write_bytes}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("bare", [True, False], ids=["a file", "an artifact"])
def test_swapped_while_it_is_opened(tmp_path, model, monkeypatch, write, bare):
    root = written(tmp_path / "a", model).path
    file = root / "model.onnx"
    from deploykit.runtimes import ort

    checked = ort.check_onnx

    def check(path):
        seal = checked(path)
        write(file, model().SerializeToString() + b"\x32\x01x")
        return seal

    monkeypatch.setattr(ort, "check_onnx", check)
    with pytest.raises(ArtifactError, match="changed while it was being opened"):
        open_session(file if bare else root)


def test_swapped_after_its_hash(tmp_path, model):
    artifact = written(tmp_path / "a", model)
    artifact = Artifact.open(artifact.path)
    artifact.check_unchanged()
    swap(artifact.path / "golden.npz", (artifact.path / "golden.npz").read_bytes())
    with pytest.raises(ArtifactError, match=r"golden\.npz changed"):
        artifact.check_unchanged()
    with pytest.raises(ArtifactError, match="changed"):
        open_session(artifact)


def test_ir_with_linked_weights(secret, tmp_path):
    import openvino as ov

    place = tmp_path / "model" / "m.xml"
    x = ov.opset8.parameter([4], np.float32, name="x")
    ov.save_model(ov.Model([ov.opset8.add(x, np.arange(4, dtype=np.float32))], [x]), place)
    open_session(place, "openvino:cpu").close()
    weights = place.with_suffix(".bin")
    weights.unlink()
    for link in (weights.symlink_to, weights.hardlink_to):
        link(secret.path / "w.bin")
        secret.touched()
        with pytest.raises(DeploykitError, match="link"):
            open_session(place, "openvino:cpu")
        weights.unlink()


def test_settings_from_the_user_may_name_files(tmp_path, model):
    (tmp_path / "m.onnx").write_bytes(model().SerializeToString())
    tuned = RuntimeSettings("openvino:cpu", settings={"CACHE_DIR": str(tmp_path / "cache")})
    tuned.open(tmp_path / "m.onnx").close()
    assert (tmp_path / "cache").is_dir()
