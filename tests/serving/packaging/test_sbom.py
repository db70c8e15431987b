"""Bundles say what they are made of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import deploykit
from deploykit.errors import DataError
from deploykit.runtimes import RuntimeSettings
from deploykit.serving.package_lock import needed
from deploykit.serving.package_plan import TargetOptions


def test_a_bundle_has_a_bill_of_materials(artifact: Any, tmp_path: Path) -> None:
    made = artifact()
    bundle = deploykit.package(made.path, tmp_path / "out", target="triton")
    assert "sbom.cdx.json" in bundle.manifest.files
    found = json.loads((bundle.path / "sbom.cdx.json").read_bytes())
    assert found["metadata"]["component"]["bom-ref"] == f"model:{made.digest}"
    assert {part["type"] for part in found["components"]} == {"file"}


def test_an_image_lists_what_it_installs(artifact: Any, tmp_path: Path) -> None:
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in needed("ort")}
    lock = tmp_path / "lock.txt"
    lock.write_text("\n".join(f"{name}==1.0 --hash=sha256:{digest}" for name, digest in hashes.items()))
    bundle = deploykit.package(artifact().path, tmp_path / "out", target="docker", options=TargetOptions(lock=lock))
    found = json.loads((bundle.path / "sbom.cdx.json").read_bytes())
    parts = {part["name"]: part for part in found["components"] if part["type"] == "library"}
    assert hashes.keys() <= parts.keys()
    assert parts["uvicorn"]["properties"] == [{"name": "deploykit:sha256", "value": hashes["uvicorn"]}]


def test_settings_with_files_do_not_get_into_a_bundle(artifact: Any, tmp_path: Path) -> None:
    made = artifact(settings=RuntimeSettings("ort:cpu", settings={"ep.context_file_path": "evil.onnx"}))
    with pytest.raises(DataError, match="names files"):
        deploykit.package(made.path, tmp_path / "out", target="triton")
