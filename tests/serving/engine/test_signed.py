"""Only what the owner of a key signed is served: at the start, at a swap, and when it is loaded again."""

from __future__ import annotations

import asyncio
import shutil
from functools import partial

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deploykit.errors import ArtifactError, DataError, ModelError
from deploykit.serving.engine import ServingEngine
from deploykit.serving.loaded import Options, Source, load
from deploykit.serving.requests import InferRequest, NotReady
from deploykit.signing import check_signature, sign

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def keys(tmp_path):
    """A private key and its public one, as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "mine.key", tmp_path / "mine.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def options(public):
    return Options(threads=1, open_artifact=partial(check_signature, public_key=public))


def test_what_is_loaded(models, keys, tmp_path):
    private, public = keys
    models.artifact(tmp_path / "net", models.scaled, 1.0)
    source = Source.at(tmp_path / "net")
    with pytest.raises(ArtifactError, match=r"net\.sig does not exist"):
        load(source, options(public))
    sign(tmp_path / "net", key=private)
    assert load(source, options(public)).digest
    with pytest.raises(DataError, match="cannot use the key"):
        load(source, options(private))
    # Another model under the signature of this one.
    shutil.rmtree(tmp_path / "net")
    models.artifact(tmp_path / "net", models.scaled, 2.0)
    with pytest.raises(ArtifactError, match="is not what was signed"):
        load(source, options(public))
    models.scaled(tmp_path / "bare.onnx", 1.0)
    with pytest.raises(ModelError, match="is a bare model file"):
        load(Source.at(tmp_path / "bare.onnx"), options(public))


def test_a_version_that_nobody_signed_does_not_take_over(models, keys, tmp_path):
    private, public = keys
    models.artifact(tmp_path / "net" / "1", models.scaled, 1.0)
    sign(tmp_path / "net" / "1", key=private)

    async def run():
        engine = ServingEngine([Source.at(tmp_path / "net")], options(public))
        await engine.start()
        try:
            await use(engine)
        finally:
            await engine.stop()

    async def answered(engine):
        found = await engine.infer(InferRequest("net", {"x": X}))
        return found.version, float(found.outputs["y"][0, 1])

    async def use(engine):
        watch = asyncio.ensure_future(engine.repository.watch(0.02))
        await asyncio.to_thread(models.artifact, tmp_path / "net" / "2", models.scaled, 2.0)
        while not any(e["version"] == "2" and "2.sig does not exist" in e["reason"] for e in engine.index()):
            await asyncio.sleep(0.01)
        assert await answered(engine) == ("1", 1.0) and engine.ready()
        with pytest.raises(NotReady, match=r"2\.sig does not exist"):
            await engine.load("net")
        # The signature comes later: that is a reason to look again.
        await asyncio.to_thread(sign, tmp_path / "net" / "2", key=private)
        while (await answered(engine))[0] != "2":
            await asyncio.sleep(0.01)
        assert await answered(engine) == ("2", 2.0)
        watch.cancel()
        # What was signed, but is changed in its place, is refused at a reload, and what answers goes on.
        await asyncio.to_thread(shutil.rmtree, tmp_path / "net" / "2")
        await asyncio.to_thread(models.artifact, tmp_path / "net" / "2", models.scaled, 5.0)
        with pytest.raises(NotReady, match="is not what was signed"):
            await engine.load("net")
        assert await answered(engine) == ("2", 2.0)

    asyncio.run(run())
