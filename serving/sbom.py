"""What an artifact is made of and by: a bill of materials in CycloneDX 1.6, with a card of the model.

The document is built here, because the CycloneDX library for Python has no model cards; the tests validate it against
the schema that comes with that library. It says what the manifest says, and is the same whenever it is made.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any
from urllib.parse import quote

from deploykit.artifact import MANIFEST, Artifact, TensorEntry

SPEC_VERSION = "1.6"
FILE_NAME = "sbom.cdx.json"
_NAMESPACE = uuid.UUID("6f0f4b1c-7f2e-4e55-9c0f-3d0f9f0b7a52")
_DISTRIBUTION = "deploykit-ml"
# Tools of a lineage by the name of their distribution where that is another one.
_DISTRIBUTIONS = {"deploykit": _DISTRIBUTION, "sklearn": "scikit-learn"}
# Licenses by their SPDX identifiers, where metadata have the older classifiers only.
_CLASSIFIERS = {
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: ISC License (ISCL)": "ISC",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "License :: OSI Approved :: Python Software Foundation License": "PSF-2.0",
}
_PLAIN_TEXT = 60


def bill_of_materials(
    artifact: Artifact, *, name: str | None = None, packages: Iterable[tuple[str, str, tuple[str, ...]]] = ()
) -> dict[str, Any]:
    """The bill of materials of an artifact.

    Args:
        artifact: Opened, so that its hashes are right.
        name: The model's name; by default its directory's.
        packages: What is installed to serve it: distribution, version, sha256 of its files.

    Returns:
        A CycloneDX document, as JSON.
    """
    manifest, called = artifact.manifest, name or artifact.path.name
    files = [_file(path, entry.sha256) for path, entry in sorted(manifest.files.items())]
    # The manifest's hash stands for all others.
    files.append(_file(MANIFEST, artifact.digest))
    tools = {}
    for step in manifest.lineage:
        for tool, version in sorted(step.tools.items()):
            made = _package(_DISTRIBUTIONS.get(tool, tool), version, ())
            tools[made["bom-ref"]] = made
    installed = {made["bom-ref"]: made for made in (_package(*package) for package in packages)}
    own = _package(_DISTRIBUTION, manifest.deploykit, ())
    model = _model(artifact, called)
    rest = {ref: made for ref, made in {**tools, **installed}.items() if ref != own["bom-ref"]}
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, artifact.digest + json.dumps(sorted(rest)))}",
        "version": 1,
        "metadata": {"timestamp": manifest.created, "tools": {"components": [own]}, "component": model},
        "components": [*files, *rest.values()],
        "dependencies": [
            {
                "ref": model["bom-ref"],
                "dependsOn": sorted(made["bom-ref"] for made in (*files, *installed.values()) if made != own),
            },
            *({"ref": made["bom-ref"]} for made in (*files, *rest.values())),
        ],
    }


def as_json(document: Mapping[str, Any]) -> bytes:
    """A document as a file."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _model(artifact: Artifact, name: str) -> dict[str, Any]:
    manifest = artifact.manifest
    properties = [{"name": "deploykit:model", "value": manifest.model}]
    for number, step in enumerate(manifest.lineage):
        properties.append({"name": f"deploykit:lineage:{number}:step", "value": step.step})
        if step.parent is not None:
            properties.append({"name": f"deploykit:lineage:{number}:parent", "value": step.parent})
        tools = ", ".join(f"{tool} {version}" for tool, version in sorted(step.tools.items()))
        if tools:
            properties.append({"name": f"deploykit:lineage:{number}:tools", "value": tools})
        source = step.params.get("source")
        if isinstance(source, str):
            properties.append({"name": f"deploykit:lineage:{number}:source", "value": source})
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model:{artifact.digest}",
        "name": name,
        "version": artifact.digest[:12],
        "hashes": [{"alg": "SHA-256", "content": manifest.files[manifest.model].sha256}],
        "modelCard": _card(artifact),
        "properties": properties,
    }


def _card(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    card: dict[str, Any] = {
        "modelParameters": {
            "inputs": [{"format": _format(spec)} for spec in manifest.inputs],
            "outputs": [{"format": _format(spec)} for spec in manifest.outputs],
        }
    }
    task = next((t for step in manifest.lineage if isinstance(t := step.params.get("task"), str)), None)
    if task:
        card["modelParameters"]["task"] = task
    metrics = [_metric(record) for record in manifest.evidence.accuracy]
    metrics += [
        {"type": f"{_compared(record)} on {record.get('device')}", "value": str(record.get("verdict"))}
        for record in manifest.evidence.parity
    ]
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return card


def _compared(record: Mapping[str, Any]) -> str:
    return f"parity of the {record['part']} with its reference" if "part" in record else "parity with the source"


def _metric(record: Mapping[str, Any]) -> dict[str, str]:
    value = next((record[key] for key in ("value", "candidate", "model") if key in record), None)
    return {
        "type": str(record.get("metric", "accuracy")),
        "value": json.dumps(record, sort_keys=True) if value is None else str(value),
        **({"slice": str(record["data"])} if "data" in record else {}),
    }


def _format(spec: TensorEntry) -> str:
    shape = "any shape" if spec.shape is None else ", ".join(map(str, spec.shape))
    return f"{spec.name}: {spec.dtype}[{shape}]"


def _file(path: str, digest: str) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": f"file:{quote(path)}",
        "name": path,
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }


def _package(name: str, version: str, hashes: tuple[str, ...]) -> dict[str, Any]:
    """A distribution; what is known of its license is that of the same version, where it is installed here."""
    purl = f"pkg:pypi/{quote(name.lower().replace('_', '-'))}@{quote(version)}"
    made: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    if hashes:
        # Several files of one version, of which one gets installed.
        made["properties"] = [{"name": "deploykit:sha256", "value": digest} for digest in sorted(hashes)]
    licenses = _licenses(name, version)
    return {**made, "licenses": licenses} if licenses else made


def _field(found: metadata.PackageMetadata, name: str) -> str:
    """Of a distribution's metadata; empty where it says nothing, which newer libraries make a KeyError of."""
    values = found.get_all(name)
    return str(values[0]) if values else ""


def _licenses(name: str, version: str) -> list[dict[str, Any]]:
    try:
        found = metadata.metadata(name)
    except (metadata.PackageNotFoundError, ValueError):
        return []
    if _field(found, "Version") != version:
        return []
    if expression := _field(found, "License-Expression"):
        return [{"expression": expression}]
    known = [_CLASSIFIERS[c] for c in found.get_all("Classifier") or () if c in _CLASSIFIERS]
    if known:
        return [{"license": {"id": spdx}} for spdx in dict.fromkeys(known)]
    text = " ".join(_field(found, "License").split())
    return [{"license": {"name": text}}] if 0 < len(text) <= _PLAIN_TEXT else []
