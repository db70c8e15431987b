"""Bills of materials and signatures of artifacts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cyclonedx.schema import _res as schemas
from jsonschema import Draft7Validator
from referencing import Registry, Resource

import deploykit
from deploykit import check_signature, sbom, sign
from deploykit.artifact import Artifact, Evidence, StepRecord, write_golden
from deploykit.cli import cli
from deploykit.errors import ArtifactError, DataError, OutputExistsError
from deploykit.extras import version_of
from deploykit.serving.sbom import bill_of_materials
from deploykit.specs import Signature, TensorSpec
from deploykit.staging import ArtifactWriter

SPEC = Signature((TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", None),))
PARITY = {"device": "ort:cpu", "verdict": "passed"}
ACCURACY = {"metric": "accuracy", "value": 0.9712, "data": "eval.npz", "odd": [1, None]}


@pytest.fixture
def artifact(tmp_path, model):
    steps = [
        StepRecord(step="export", params={"source": "model.py:make", "task": "image classification"}, parent=None,
                   tools={"deploykit": deploykit.__version__, "torch": "0.0.1", "numpy": np.__version__}, seconds=1.5),
        StepRecord(step="quantize", params={}, parent="0" * 64, tools={"onnxruntime": str(version_of("onnxruntime"))},
                   seconds=2.0, notes=["a note"]),
    ]  # fmt: skip
    with ArtifactWriter(tmp_path / "net") as writer:
        (writer.dir / "model.onnx").write_bytes(model().SerializeToString())
        (writer.dir / "assets").mkdir()
        (writer.dir / "assets" / "a name with ünusual signs.txt").write_text("x")
        write_golden(writer.dir / "golden.npz", [({"x": np.ones(4, "f")}, {"y": np.ones(4, "f")})])
        evidence = Evidence(parity=[PARITY], accuracy=[ACCURACY])
        return writer.commit(model="model.onnx", signature=SPEC, lineage=steps, evidence=evidence)


@pytest.fixture(scope="module")
def validator():
    folder = Path(schemas.__file__).parent
    names = ("bom-1.6", "spdx", "jsf-0.82", "cryptography-defs")
    found = {name: json.loads((folder / f"{name}.SNAPSHOT.schema.json").read_text()) for name in names}
    places = [
        (f"http://cyclonedx.org/schema/{name}.SNAPSHOT.schema.json", Resource.from_contents(schema))
        for name, schema in found.items()
    ]
    registry = Registry().with_resources(places)
    return Draft7Validator(found["bom-1.6"], registry=registry)


def test_sbom(artifact, validator):
    document = json.loads(sbom(artifact.path))
    assert not [error.message for error in validator.iter_errors(document)]
    model = document["metadata"]["component"]
    assert model["type"] == "machine-learning-model" and model["name"] == "net"
    assert model["hashes"] == [{"alg": "SHA-256", "content": artifact.manifest.files["model.onnx"].sha256}]
    card = model["modelCard"]
    assert card["modelParameters"] == {
        "inputs": [{"format": "x: float32[batch, 4]"}],
        "outputs": [{"format": "y: float32[any shape]"}],
        "task": "image classification",
    }
    assert {"type": "accuracy", "value": "0.9712", "slice": "eval.npz"} in card["quantitativeAnalysis"][
        "performanceMetrics"
    ]
    parts = {part["name"]: part for part in document["components"]}
    assert {"model.onnx", "golden.npz", "manifest.json", "numpy", "onnxruntime", "torch"} <= parts.keys()
    assert parts["manifest.json"]["hashes"][0]["content"] == artifact.digest
    assert parts["numpy"]["version"] == np.__version__ and parts["numpy"]["licenses"]
    assert "licenses" not in parts["torch"]  # of another version than the one that is installed here
    refs = [part["bom-ref"] for part in document["components"]]
    assert len(set(refs)) == len(refs)
    known = {*refs, model["bom-ref"]}
    assert {ref for found in document["dependencies"] for ref in (found["ref"], *found.get("dependsOn", ()))} == known
    assert {"name": "deploykit:lineage:0:source", "value": "model.py:make"} in model["properties"]
    assert sbom(artifact.path) == sbom(artifact.path)


def test_sbom_with_what_serves_it(artifact, validator):
    packages = [("uvicorn", "0.1", ("a" * 64, "b" * 64)), ("deploykit-ml", deploykit.__version__, ())]
    document = bill_of_materials(artifact, name="other", packages=packages)
    assert not [error.message for error in validator.iter_errors(document)]
    assert document["metadata"]["component"]["name"] == "other"
    (main,) = [found for found in document["dependencies"] if found["ref"].startswith("model:")]
    assert "pkg:pypi/uvicorn@0.1" in main["dependsOn"]
    assert document["serialNumber"] != bill_of_materials(artifact)["serialNumber"]


def test_the_validator_finds_something(artifact, validator):
    document = bill_of_materials(artifact)
    document["metadata"]["component"]["type"] = "model"
    assert list(validator.iter_errors(document))


# --- signatures ------------------------------------------------------------------------------------------------------


def write_keys(folder, name, key=None, password=None):
    key = key or ec.generate_private_key(ec.SECP256R1())
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def keys(tmp_path):
    return write_keys(tmp_path, "mine")


def edit(artifact):
    (artifact.path / "model.onnx").write_bytes(b"x" + (artifact.path / "model.onnx").read_bytes()[1:])


def edit_with_the_manifest(artifact):
    """What hashes alone do not find."""
    import hashlib

    edit(artifact)
    file = artifact.path / "manifest.json"
    found = json.loads(file.read_bytes())
    found["files"]["model.onnx"]["sha256"] = hashlib.sha256((artifact.path / "model.onnx").read_bytes()).hexdigest()
    file.write_text(json.dumps(found))
    Artifact.open(artifact.path)


def test_sign_and_check(artifact, keys, tmp_path):
    signature = sign(artifact.path, key=keys[0])
    assert signature == tmp_path / "net.sig"
    assert check_signature(artifact.path, public_key=keys[1]).digest == artifact.digest
    with pytest.raises(OutputExistsError):
        sign(artifact.path, key=keys[0])
    with pytest.raises(ArtifactError, match="is not what was signed"):
        check_signature(artifact.path, public_key=write_keys(tmp_path, "other")[1])
    edit_with_the_manifest(artifact)
    with pytest.raises(ArtifactError, match="is not what was signed"):
        check_signature(artifact.path, public_key=keys[1])
    with pytest.raises(ArtifactError, match="is not what was signed"):
        check_signature(artifact.path, public_key=keys[1], signature=keys[1])


def test_what_cannot_be_signed(artifact, keys, tmp_path):
    with pytest.raises(ArtifactError, match=r"net\.sig does not exist"):
        check_signature(artifact.path, public_key=keys[1])
    other = write_keys(tmp_path, "ed", ed25519.Ed25519PrivateKey.generate())
    locked = write_keys(tmp_path, "locked", password=b"secret")
    for key in (tmp_path / "none", keys[1], artifact.path / "model.onnx", other[0], locked[0]):
        with pytest.raises(DataError, match="cannot use the key"):
            sign(artifact.path, key=key)
    for key in (tmp_path / "none", keys[0], other[1]):
        (tmp_path / "net.sig").write_text("{}")
        with pytest.raises(DataError, match="cannot use the key"):
            check_signature(artifact.path, public_key=key)
    edit(artifact)
    with pytest.raises(ArtifactError, match="sha256"):
        sign(artifact.path, key=keys[0], output=tmp_path / "new.sig")
    assert not (tmp_path / "new.sig").exists()


def test_locked_key(artifact, tmp_path):
    private, public = write_keys(tmp_path, "locked", password=b"secret")
    sign(artifact.path, key=private, password="secret")
    assert check_signature(artifact.path, public_key=public)


def run(*args):
    from click.testing import CliRunner

    return CliRunner().invoke(cli, [str(arg) for arg in args])


def test_commands(artifact, keys, tmp_path):
    done = run("sbom", artifact.path)
    assert json.loads(done.output)["bomFormat"] == "CycloneDX"
    done = run("sbom", artifact.path, "-o", tmp_path / "s.json", "--name", "other")
    assert (
        done.exit_code == 0
        and json.loads((tmp_path / "s.json").read_bytes())["metadata"]["component"]["name"] == "other"
    )
    assert "net.sig" in run("sign", artifact.path, "--key", keys[0]).output
    done = run("verify", "-m", artifact.path, "--public-key", keys[1], "--device", "ort:cpu")
    assert "is what the owner of" in done.output
    done = run("verify", "-m", artifact.path, "--signature", tmp_path / "net.sig")
    assert done.exit_code == 2
    done = run("sign", artifact.path, "--key", keys[0], "--password-env", "NO_SUCH_VARIABLE")
    assert isinstance(done.exception, DataError)
    edit_with_the_manifest(artifact)
    done = run("verify", "-m", artifact.path, "--public-key", keys[1])
    assert isinstance(done.exception, ArtifactError)
