"""The image: a linter reads the Dockerfile, its steps run in a clean environment, the manifests shut it in."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import yaml

import deploykit
from deploykit.artifact import Artifact
from deploykit.errors import OutputExistsError, PackageError
from deploykit.runtimes import RuntimeSettings
from deploykit.serving.loaded import Options
from deploykit.serving.package_lock import (
    FORBIDDEN,
    check_lock,
    machine_of_image,
    needed,
    read_lock,
    read_report,
    resolve,
)
from deploykit.serving.package_plan import TargetOptions
from deploykit.serving.package_wheel import find_packages
from deploykit.serving.servers import Places
from deploykit.serving.yaml_text import dump

ROOT = Path(__file__).resolve().parents[3]
BASE = "python:3.11-slim@sha256:" + "a" * 64


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """Hashes of nothing: enough to write the files, of no use to install them."""
    path = tmp_path / "lock.txt"
    lines = [f"{name}==1.0 \\\n    --hash=sha256:{hashlib.sha256(name.encode()).hexdigest()}" for name in needed("ort")]
    path.write_text("\n".join(["# made by hand", *lines]), encoding="utf-8")
    return path


@pytest.fixture
def bundle(artifact: Any, tmp_path: Path, lock: Path) -> Any:
    return deploykit.package(artifact().path, tmp_path / "out", target="docker", options=TargetOptions(lock=lock))


def steps(dockerfile: Path) -> list[tuple[str, str]]:
    """Instructions, with continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", dockerfile.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def test_the_linter_has_nothing_to_say(bundle: Any) -> None:
    linter = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([linter, bundle.path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_linter_looks(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN pip install x\n", encoding="utf-8")
    linter = Path(sysconfig.get_path("scripts")) / "hadolint"
    assert subprocess.run([linter, tmp_path / "Dockerfile"], capture_output=True, check=False).returncode != 0


def test_what_is_copied_is_there_and_not_ignored(bundle: Any) -> None:
    kept = {line[1:] for line in (bundle.path / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [part for name, rest in steps(bundle.path / "Dockerfile") if name == "COPY" and "--from" not in rest
              for part in rest.split()[:-1]]  # fmt: skip
    assert set(copied) == kept
    for name in copied:
        assert (bundle.path / name).exists(), name


def test_the_image_runs_as_nobody_from_a_pinned_base(artifact: Any, tmp_path: Path, lock: Path) -> None:
    options = TargetOptions(lock=lock, base_image=BASE, image="registry.example/team/net:7", max_delay_ms=1.5)
    bundle = deploykit.package(
        artifact().path, tmp_path / "out", target="docker", name="Net.v2", max_batch=32, options=options
    )
    found = steps(bundle.path / "Dockerfile")
    assert ("ARG", f"BASE_IMAGE={BASE}") in found
    assert [rest for name, rest in found if name == "FROM"] == ["${BASE_IMAGE} AS build", "${BASE_IMAGE}"]
    assert ("USER", "10001:10001") in found
    entry = json.loads(dict(found)["ENTRYPOINT"])
    assert entry[1:3] == ["serve", "/models/Net.v2"]
    assert entry[entry.index("--max-batch") + 1] == "32"
    assert entry[entry.index("--max-delay-ms") + 1] == "1.5"
    service = yaml.safe_load((bundle.path / "compose.yaml").read_text(encoding="utf-8"))["services"]["net-v2"]
    assert service["image"] == "registry.example/team/net:7"
    assert service["build"] == {"context": "."}


def test_the_entry_point_is_a_command_of_ours(bundle: Any) -> None:
    import click

    from deploykit.cli import cli

    entry = json.loads(dict(steps(bundle.path / "Dockerfile"))["ENTRYPOINT"])
    command = cli.get_command(None, entry[1])  # type: ignore[arg-type]
    with click.Context(command) as context:
        command.parse_args(context, list(entry[2:]))
    assert context.params["host"] == "0.0.0.0"


def test_without_a_base_none_is_made_up(bundle: Any) -> None:
    assert ("ARG", "BASE_IMAGE") in steps(bundle.path / "Dockerfile")
    text = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert "docker buildx imagetools inspect" in text
    service = yaml.safe_load((bundle.path / "compose.yaml").read_text(encoding="utf-8"))["services"]["net"]
    assert service["build"]["args"]["BASE_IMAGE"].startswith("${BASE_IMAGE:?")


@pytest.mark.parametrize("base", ["python:3.11", "python:3.11@sha256:abc", "a b@sha256:" + "a" * 64])
def test_a_base_without_its_digest_is_refused(artifact: Any, tmp_path: Path, lock: Path, base: str) -> None:
    with pytest.raises(PackageError, match="not pinned"):
        deploykit.package(
            artifact().path, tmp_path / "out", target="docker", options=TargetOptions(lock=lock, base_image=base)
        )
    assert not (tmp_path / "out").exists()


def test_whoever_ends_the_server_waits_until_the_last_request_is_answered(bundle: Any) -> None:
    service = yaml.safe_load((bundle.path / "compose.yaml").read_text(encoding="utf-8"))["services"]["net"]
    deployment = next(yaml.safe_load_all((bundle.path / "kubernetes.yaml").read_text(encoding="utf-8")))
    seconds = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert service["stop_grace_period"] == f"{seconds}s"
    assert "--timeout" not in json.loads(dict(steps(bundle.path / "Dockerfile"))["ENTRYPOINT"])
    assert seconds > Options().timeout_s + 2 * Places().linger_s


def test_compose_shuts_the_service_in(bundle: Any) -> None:
    service = yaml.safe_load((bundle.path / "compose.yaml").read_text(encoding="utf-8"))["services"]["net"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["image"] == f"net:{bundle.manifest.artifact[:12]}"


def test_kubernetes_probes_and_rights(bundle: Any) -> None:
    documents = list(yaml.safe_load_all((bundle.path / "kubernetes.yaml").read_text(encoding="utf-8")))
    deployment, service = documents
    assert [d["kind"] for d in documents] == ["Deployment", "Service"]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["startupProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    names = {p["name"] for p in container["ports"]}
    assert {p["targetPort"] for p in service["spec"]["ports"]} == names - {"metrics"}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_tuned_settings_are_in_the_artifact_of_the_image(artifact: Any, tmp_path: Path, lock: Path) -> None:
    RuntimeSettings("ort:cpu", threads=2, sessions=3, batch=4).save(tmp_path / "tuned.json")
    made = artifact()
    bundle = deploykit.package(
        made.path, tmp_path / "out", target="docker", settings=tmp_path / "tuned.json", options=TargetOptions(lock=lock)
    )
    inside = Artifact.open(bundle.path / "models" / "net")
    assert inside.digest != made.digest
    assert inside.manifest.lineage[-1].step == "package"
    assert inside.manifest.lineage[-1].parent == made.digest
    kept = RuntimeSettings.load(inside.path / "settings.json")
    assert (kept.threads, kept.sessions) == (2, 3)
    with deploykit.load(inside.path) as session:
        assert session.settings["tuned_notes"] == []
    pod = next(yaml.safe_load_all((bundle.path / "kubernetes.yaml").read_text(encoding="utf-8")))
    assert pod["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "6"


def test_an_artifact_without_other_settings_is_copied_as_it_is(bundle: Any, tmp_path: Path) -> None:
    assert Artifact.open(bundle.path / "models" / "net").digest == Artifact.open(tmp_path / "net").digest


def test_the_lock_asks_for_all_that_the_server_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = {re.split(r"[<>=\[; ]", line)[0] for line in project["project"]["optional-dependencies"]["serve"]}
    assert wanted - {"deploykit-ml"} <= set(needed("ort"))


def start(command: list[str], cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a server on free ports, and wait until it says that it is ready."""
    for option in ("--http-port", "--grpc-port", "--admin-port"):
        command[command.index(option) + 1] = "0"
    command[command.index("--host") + 1] = "127.0.0.1"
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, text=True)


def asked_of(server: subprocess.Popen[str], bundle: Path) -> None:
    """The smoke test over HTTP, then SIGTERM, after which the server ends well."""
    try:
        assert server.stdout is not None
        found = re.match(r"ready: (http://127\.0\.0\.1:\d+),", server.stdout.readline())
        assert found is not None
        for wire in ("binary", "json"):
            assert deploykit.smoke(bundle, found[1], wire=wire, wait_s=30)["passed"]
        server.terminate()
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("kind", ["rows", "text", "steps", "scalar"])
def test_the_entry_point_answers_the_golden_requests(artifact: Any, tmp_path: Path, lock: Path, kind: str) -> None:
    bundle = deploykit.package(artifact(kind).path, tmp_path / "out", target="docker", options=TargetOptions(lock=lock))
    _, *arguments = json.loads(dict(steps(bundle.path / "Dockerfile"))["ENTRYPOINT"])
    arguments = [str(bundle.path) + a if a.startswith("/models/") else a for a in arguments]
    asked_of(start([sys.executable, "-m", "deploykit", *arguments], tmp_path), bundle.path)


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_the_lock_holds_our_wheel(bundle: Any) -> None:
    pins = {p.name: p for p in read_lock(bundle.path / "requirements.txt")}
    (wheel,) = (bundle.path / "wheels").iterdir()
    assert pins["deploykit-ml"].hashes == (hashlib.sha256(wheel.read_bytes()).hexdigest(),)
    assert set(needed("ort")) < set(pins)
    assert not set(FORBIDDEN) & set(pins)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("numpy==2.0", "numpy==2.0"),
        ("numpy>=2 --hash=sha256:" + "a" * 64, "numpy>=2"),
        ("numpy==2.0 --hash=sha256:abc", "numpy==2.0"),
        ("numpy==2.0 --hash=md5:" + "a" * 32, "numpy==2.0"),
        ("--index-url https://x", "--index-url"),
        ("-e .", "-e ."),
        ("numpy @ https://x/y.whl --hash=sha256:" + "a" * 64, "numpy @"),
        ("", "lacks click"),
    ],
)
def test_locks_that_are_none(artifact: Any, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "bad.txt").write_text(text, encoding="utf-8")
    with pytest.raises(PackageError, match=re.escape(words)):
        deploykit.package(
            artifact().path, tmp_path / "out", target="docker", options=TargetOptions(lock=tmp_path / "bad.txt")
        )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("name", ["torch", "nvidia-cublas-cu12", "tensorflow", "deploykit-ml"])
def test_frameworks_are_refused(lock: Path, name: str) -> None:
    lock.write_text(lock.read_text(encoding="utf-8") + f"\n{name}==1 --hash=sha256:{'b' * 64}\n", encoding="utf-8")
    with pytest.raises(PackageError, match=name):
        check_lock(read_lock(lock), needed("ort"), str(lock))


def test_a_lock_may_have_markers_and_several_hashes(tmp_path: Path) -> None:
    path = tmp_path / "lock.txt"
    path.write_text(
        f"Foo_Bar==1.0 ; python_version < '3.12' \\\n  --hash=sha256:{'a' * 64} \\\n"
        f"  --hash=sha256:{'b' * 64}  # via x\n",
        encoding="utf-8",
    )
    (pin,) = read_lock(path)
    assert (pin.name, pin.version, pin.marker) == ("foo-bar", "1.0", "python_version < '3.12'")
    assert pin.hashes == ("a" * 64, "b" * 64)
    path.write_text(str(pin), encoding="utf-8")
    assert read_lock(path) == (pin,)


def test_no_network_is_said_with_the_way_out(artifact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(PackageError, match=r"hashes .* could not be had: .*--lock FILE"):
        deploykit.package(artifact().path, tmp_path / "out", target="docker")
    assert not (tmp_path / "out").exists()


def test_a_report_without_hashes_is_refused() -> None:
    item = {"metadata": {"name": "x", "version": "1"}, "download_info": {"url": "file:///x"}}
    with pytest.raises(PackageError, match="no sha256 for x 1"):
        read_report({"install": [item]})


# --- the wheel --------------------------------------------------------------------------------------------------------


def test_the_wheel_holds_every_package(bundle: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["setuptools"]["packages"]
    (wheel,) = (bundle.path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        meta = Parser().parsestr(archive.read("deploykit_ml-0.1.0.dist-info/METADATA").decode())
    folders = project["tool"]["setuptools"]["package-dir"]
    for package in packages:
        folder = ROOT / folders.get(package, package.replace(".", "/"))
        for path in folder.glob("*.py"):
            assert f"{package.replace('.', '/')}/{path.name}" in names
    assert {"deploykit/py.typed", "deploykit/targets.toml"} <= names
    assert meta["Version"] == deploykit.__version__ == project["project"]["version"]
    assert not any("suite" in name for name in names)
    held = {name.rpartition("/")[0].replace("/", ".") for name in names if name.endswith("/__init__.py")}
    assert held == set(packages)


@pytest.mark.parametrize("inside", [True, False], ids=["installed", "a checkout"])
def test_a_new_package_is_found_wherever_it_lies(tmp_path: Path, inside: bool) -> None:
    home = tmp_path / "deploykit"
    tops = {"deploykit": home} if inside else {"deploykit": home, "deploykit.runtimes": tmp_path / "runtimes"}
    runtimes = home / "runtimes" if inside else tmp_path / "runtimes"
    folders = {
        "deploykit": home, "deploykit.cli": home / "cli", "deploykit.cli.deep": home / "cli" / "deep",
        "deploykit.runtimes": runtimes, "deploykit.runtimes.new": runtimes / "new",
    }  # fmt: skip
    for folder in folders.values():
        folder.mkdir()
        (folder / "__init__.py").touch()
    for other in (home / "cli" / "__pycache__", runtimes / "suite", tmp_path / "tests"):
        other.mkdir()
        (other / "module.py").touch()
    assert find_packages(tops) == folders


def test_a_model_of_bfloat16_brings_what_numpy_lacks() -> None:
    assert set(needed("ort", ".onnx", {"float32", "bfloat16"})) - set(needed("ort")) == {"ml-dtypes"}


def test_the_same_sources_give_the_same_wheel(bundle: Any, artifact: Any, tmp_path: Path, lock: Path) -> None:
    again = deploykit.package(tmp_path / "net", tmp_path / "two", target="docker", options=TargetOptions(lock=lock))
    assert (again.path / "requirements.txt").read_bytes() == (bundle.path / "requirements.txt").read_bytes()


# --- all targets ------------------------------------------------------------------------------------------------------


def test_an_output_that_is_there_stays(bundle: Any, tmp_path: Path, lock: Path) -> None:
    before = (bundle.path / "deploykit.json").read_bytes()
    with pytest.raises(OutputExistsError):
        deploykit.package(tmp_path / "net", bundle.path, target="docker", options=TargetOptions(lock=lock))
    assert (bundle.path / "deploykit.json").read_bytes() == before


def test_options_of_other_targets_are_refused(artifact: Any, tmp_path: Path, lock: Path) -> None:
    with pytest.raises(PackageError, match="--lock means nothing to triton; it is for docker"):
        deploykit.package(artifact().path, tmp_path / "out", target="triton", options=TargetOptions(lock=lock))


@pytest.mark.parametrize("name", [".", "..", "a/b", "-x", "a b", "é", "x" * 64, "a\n"])
def test_names_that_are_none(artifact: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(PackageError, match="cannot be a model's name"):
        deploykit.package(artifact().path, tmp_path / "out", target="triton", name=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "value",
    [
        {"a": "true", "b": "1.0", "c": "- x", "d": "a: b", "e": "", "f": "null"},
        {"g": "é \n\t\"'", "h": "@x", "i": "0x1", "no": "NO", "k": "2026-01-01", "l": "~", "m": "a #b"},
        {"a": [], "b": {}, "c": [1, [2, {"d": None}], {"e": {"f": [True, 1.5]}}], "3:4": "y"},
    ],
)
def test_yaml_is_read_as_it_was_meant(value: dict[str, Any]) -> None:
    assert yaml.safe_load(dump(value)) == value


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_steps_run_in_a_clean_environment(artifact: Any, tmp_path: Path) -> None:
    """Every RUN of the Dockerfile, with its folders moved; hashes from the package index."""
    bundle = deploykit.package(artifact().path, tmp_path / "out", target="docker")
    home, context = tmp_path / "image", tmp_path / "bundle"
    context.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    for name, rest in steps(bundle.path / "Dockerfile"):
        if name == "COPY" and "--from" not in rest:
            *sources, target = rest.split()
            for source in sources:
                origin = bundle.path / source
                place = context / target / (source if target == "./" else "")
                (shutil.copytree if origin.is_dir() else shutil.copyfile)(origin, place)
        if name == "RUN":
            moved = rest.replace("/opt/deploykit", str(home)).replace("/bundle", str(context))
            done = subprocess.run(
                ["sh", "-euc", moved], cwd=context, env=env, capture_output=True, text=True, check=False, timeout=600
            )
            assert done.returncode == 0, done.stdout + done.stderr
    size = sum(p.stat().st_size for p in home.rglob("*") if p.is_file())
    assert size < 250e6
    site = next(home.glob("lib/python*/site-packages"))
    assert not any(site.glob("torch*"))
    _, *arguments = json.loads(dict(steps(bundle.path / "Dockerfile"))["ENTRYPOINT"])
    arguments = [str(context) + a if a.startswith("/models/") else a for a in arguments]
    asked_of(start([str(home / "bin" / "deploykit"), *arguments], tmp_path, env), bundle.path)
    assert not (site / "pip").exists()


@pytest.mark.slow
def test_the_index_is_asked_for_the_image_and_not_for_this_machine() -> None:
    pins = {p.name: p for p in resolve(["onnxruntime", "numpy"])}
    assert {"onnxruntime", "numpy", "protobuf", "flatbuffers"} <= set(pins)
    assert all(len(p.hashes[0]) == 64 for p in pins.values())
    assert machine_of_image() in ("x86_64", "aarch64")
