"""The verbs `sbom` and `sign`, and the check of a signature: who made an artifact, and of what.

Signatures are those of OpenSSF model signing, with a key of one's own and without a network. They are files beside the
artifact, because nothing may be added to it. Any tool that knows the format can verify them.
"""

from __future__ import annotations

from pathlib import Path

from deploykit.artifact import SIGNATURE_SUFFIX, Artifact
from deploykit.errors import ArtifactError, DataError, first_line
from deploykit.extras import require
from deploykit.staging import check_free, write_file

_KEY = "an elliptic-curve key in PEM (openssl ecparam -name prime256v1 -genkey -noout)"


def sbom(model: str | Path, output: str | Path | None = None, *, name: str | None = None) -> bytes:
    """Write the bill of materials of an artifact: CycloneDX 1.6, with a model card.

    Args:
        model: The artifact; what `optimize` wrote stands for its winner.
        output: File that receives it; must not exist. None writes none.
        name: The model's name; by default its directory's.

    Returns:
        The document.

    Raises:
        ArtifactError: No artifact, or it was changed.
        OutputExistsError: Something stands at the output.
    """
    from deploykit.serving.sbom import as_json, bill_of_materials

    if output is not None:
        check_free(Path(output))
    document = as_json(bill_of_materials(Artifact.open(model), name=name))
    if output is not None:
        write_file(Path(output), document)
    return document


def sign(model: str | Path, *, key: str | Path, output: str | Path | None = None, password: str | None = None) -> Path:
    """Sign an artifact: its manifest and every file.

    Args:
        model: The artifact, which is verified first.
        key: Private key, PEM.
        output: File that receives the signature; by default beside the artifact, with `.sig` behind its name.
        password: Of the key, where it is encrypted.

    Returns:
        The signature's file.

    Raises:
        ArtifactError: No artifact, or it was changed.
        DataError: The key cannot be used.
        OutputExistsError: Something stands at the output.
        MissingDependencyError: model-signing is not installed.
    """
    signing = require("model_signing.signing", extra="sign")
    artifact = Artifact.open(model)
    target = Path(output) if output is not None else signature_of(artifact.path)
    check_free(target)
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=Path(key), password=_bytes(password))
    except Exception as exc:
        raise DataError(f"cannot use the key {key} ({first_line(exc)})", expected=f"{_KEY}") from exc
    config.set_hashing_config(_everything())
    config.sign(artifact.path, target)
    artifact.check_unchanged()
    return target


def check_signature(model: str | Path, *, public_key: str | Path, signature: str | Path | None = None) -> Artifact:
    """Check that an artifact is what the owner of a key signed.

    Args:
        model: The artifact; its files are checked against its manifest, too.
        public_key: PEM.
        signature: Its file; by default beside the artifact, with `.sig` behind its name.

    Returns:
        The artifact.

    Raises:
        ArtifactError: There is no signature, another key made it, or something was changed since.
        DataError: The key cannot be used.
        MissingDependencyError: model-signing is not installed.
    """
    verifying = require("model_signing.verifying", extra="sign")
    artifact = Artifact.open(model)
    file = Path(signature) if signature is not None else signature_of(artifact.path)
    if not file.is_file():
        raise ArtifactError(f"{file} does not exist", expected="the artifact's signature", hint="see: deploykit sign")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=Path(public_key))
    except Exception as exc:
        raise DataError(f"cannot use the key {public_key} ({first_line(exc)})", expected="a public key in PEM") from exc
    config.set_hashing_config(_everything())
    try:
        config.verify(artifact.path, file)
    except Exception as exc:
        raise ArtifactError(
            f"{artifact.path} is not what was signed with this key ({first_line(exc)})",
            hint="do not use it, or ask its maker for the right key",
        ) from exc
    artifact.check_unchanged()
    return artifact


def signature_of(artifact: Path) -> Path:
    """Where an artifact's signature is looked for."""
    place = artifact.resolve()
    return place.with_name(place.name + SIGNATURE_SUFFIX)


def _everything() -> object:
    """Every file is hashed, also those that look like git's; links are refused."""
    hashing = require("model_signing.hashing", extra="sign")
    return hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False).set_allow_symlinks(False)


def _bytes(password: str | None) -> bytes | None:
    return None if password is None else password.encode()
