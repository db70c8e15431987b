"""The folders of the repository import as `deploykit.*`: bare checkout, editable install and wheel."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
MAPPED: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
FOLDERS = sorted(set(MAPPED.values()) - {"deploykit"})

WHERE = """
import importlib, json, sys
print(json.dumps({name: importlib.import_module(name).__file__ for name in sys.argv[1:]}))
"""


def repository_files() -> list[Path]:
    """The files of the checkout, relative to its root: tracked ones and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = {Path(name) for name in listed.split("\0") if name}
    return sorted(path for path in paths if (ROOT / path).is_file())


def python(*args: str, cwd: Path, path: list[Path] | None = None) -> subprocess.CompletedProcess[str]:
    """Run this Python in `cwd`.

    With `path`, only those directories and the dependencies' are searched: under -S no .pth file is read, so
    the editable install is not there.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    options: list[str] = []
    if path is not None:
        options = ["-S"]
        libraries = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
        env["PYTHONPATH"] = os.pathsep.join([*map(str, path), *libraries])
    return subprocess.run(
        [sys.executable, *options, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def where(*, cwd: Path, path: list[Path] | None = None) -> dict[str, Path]:
    """Import every package in a new interpreter and say which file each came from."""
    done = python("-c", WHERE, *PACKAGES, cwd=cwd, path=path)
    assert done.returncode == 0, done.stderr
    return {name: (cwd / file).resolve() for name, file in json.loads(done.stdout).items()}


def in_checkout(root: Path) -> dict[str, Path]:
    """The files that the packages have in a checkout."""
    folders = {package: folder_of(package) for package in PACKAGES}
    return {package: root / folder / "__init__.py" for package, folder in folders.items()}


def folder_of(package: str) -> str:
    """The folder of a package: its own entry in package-dir, or a folder below its parent's."""
    if package in MAPPED:
        return MAPPED[package]
    parent, _, last = package.rpartition(".")
    return f"{folder_of(parent)}/{last}"


def package_of(folder: Path) -> str:
    """The package that a folder of the repository has to be."""
    parts = folder.parts if folder.parts[0] == "deploykit" else ("deploykit", *folder.parts)
    return ".".join(parts)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare copy of the repository."""
    copy = tmp_path_factory.mktemp("checkout").resolve()
    for path in repository_files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, copy / path)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of its own: building leaves files behind."""
    out = tmp_path_factory.mktemp("wheel").resolve()
    source = out / "source"
    shutil.copytree(checkout, source)
    flags = ["--no-deps", "--no-build-isolation", "--no-index"]
    built = python("-m", "pip", "wheel", *flags, "--wheel-dir", str(out), str(source), cwd=out)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel installed in it."""
    site = tmp_path_factory.mktemp("site").resolve()
    flags = ["--no-deps", "--no-index", "--target", str(site)]
    done = python("-m", "pip", "install", *flags, str(wheel), cwd=wheel.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


def test_without_an_install_nothing_is_found_elsewhere(tmp_path: Path) -> None:
    done = python("-c", "import deploykit", cwd=tmp_path, path=[])
    assert done.returncode != 0
    assert "No module named 'deploykit'" in done.stderr


def test_bare_checkout(checkout: Path) -> None:
    assert where(cwd=checkout, path=[]) == in_checkout(checkout)


def test_bare_checkout_shadows_the_editable_install(checkout: Path) -> None:
    assert where(cwd=checkout) == in_checkout(checkout)


def test_editable_install(tmp_path: Path) -> None:
    assert where(cwd=tmp_path) == in_checkout(ROOT)


def test_wheel(installed: Path, tmp_path: Path) -> None:
    expected = {package: installed.joinpath(*package.split("."), "__init__.py") for package in PACKAGES}
    assert where(cwd=tmp_path, path=[installed]) == expected


def test_wheel_shadowed_by_the_checkout(installed: Path, checkout: Path) -> None:
    assert where(cwd=checkout, path=[installed]) == in_checkout(checkout)


def test_every_package_of_the_repository_is_listed() -> None:
    outside = {"tests", "examples"}
    found = {
        package_of(path.parent)
        for path in repository_files()
        if path.name == "__init__.py" and path.parts[0] not in outside
    }
    assert found == set(PACKAGES)


def test_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    expected = set()
    for path in repository_files():
        if path.parts[0] not in MAPPED.values() or path.suffix == ".md":
            continue
        if path.parts[:2] == ("benchmarks", "suite"):  # scripts behind published figures, run from a checkout
            continue
        expected.add(path.as_posix() if path.parts[0] == "deploykit" else f"deploykit/{path.as_posix()}")
    assert "deploykit/py.typed" in expected
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {name.split("/")[0] for name in names if ".dist-info/" in name} == {"deploykit_ml-0.1.0.dist-info"}
    assert not [name for name in names if "test" in Path(name).parts or "tests" in Path(name).parts]


@pytest.mark.parametrize("path", [p for p in repository_files() if p.suffix == ".py"], ids=str)
def test_folders_are_never_imported_by_their_own_name(path: Path) -> None:
    """`import exporters` works from the root, as a second copy of every class in it."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))
    assert [name for name in imported(tree) if name.split(".")[0] in FOLDERS] == []


def imported(tree: ast.Module) -> list[str]:
    """The absolute names that a module imports, `import_module("...")` and its like included."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__", "importorskip"}:
                names.append(str(node.args[0].value))
    return names


@pytest.mark.parametrize(
    "source",
    [
        "import exporters",
        "import os, runtimes.base as base",
        "def f():\n    from optimizers.steps import x",
        "importlib.import_module('serving')",
    ],
)
def test_the_forbidden_imports_are_seen(source: str) -> None:
    assert [name for name in imported(ast.parse(source)) if name.split(".")[0] in FOLDERS]


def pins() -> dict[str, str]:
    """The versions in constraints.txt."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals and version, f"not an exact version: {line}"
            assert canonicalize_name(name) not in found, f"twice: {name}"
            found[canonicalize_name(name)] = version
    return found


def test_constraints_pin_every_dependency() -> None:
    project = PROJECT["project"]
    wanted = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    pinned = pins()
    for requirement in map(Requirement, wanted):
        if requirement.name == project["name"]:
            continue
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: pinned to {version}"


def test_constraints_name_torch_without_a_build() -> None:
    """`2.13.0` accepts every build of torch; `2.13.0+cpu` is found on no default index."""
    assert pins()["torch"] == "2.13.0"
    assert not [name for name, version in pins().items() if "+" in version]
