"""int8 files of Microsoft Olive and Hugging Face Optimum: PYTHON benchmarks/suite/foreign_files.py MODEL DATA FOLDER

PYTHON is that of an environment of its own, since both tools bring their own versions of transformers:

    python -m venv peers
    peers/bin/pip install torch==2.13.0 onnxruntime==1.32.0 olive-ai==0.13.0 optimum-onnx==0.1.0 datasets==5.0.1

MODEL is an ONNX file, DATA an .npz whose arrays have a row a sample and the names of the model's inputs. Each recipe is
what its tool's own documentation or examples give for int8 on a CPU, and runs in a child process with a time limit. It
starts from MODEL, not from an export of the tool's own. What came of it has to run in onnxruntime. FOLDER gets a folder
a recipe and `report.json`: the file or the reason why there is none, the seconds, and the versions of the packages.
Nothing is fetched, and telemetry is off.

`optimize_peers.py --foreign PYTHON` calls this and compares the files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("torch==2.13.0", "onnxruntime==1.32.0", "olive-ai==0.13.0", "optimum-onnx==0.1.0", "datasets==5.0.1")
HOW = f"python -m venv peers && peers/bin/pip install {' '.join(PACKAGES)}, then --foreign peers/bin/python"
CPU = "CPUExecutionProvider"
BATCH = 8
ALONE = {
    "OLIVE_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def samples(model: Path, data: Path) -> dict[str, np.ndarray]:
    """The arrays of the model's inputs, a row a sample."""
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    with np.load(data) as arrays:
        return {i.name: arrays[i.name] for i in graph.input if i.name in arrays}


def of_products(model: Path) -> bool:
    """Whether the model computes with products more than with convolutions, as transformers do."""
    import onnx

    counts = Counter(n.op_type for n in onnx.load(str(model), load_external_data=False).graph.node)
    return counts["MatMul"] > counts["Conv"]


def by_olive(model: Path, data: Path, folder: Path, passes: dict[str, dict[str, Any]]) -> None:
    """Run a workflow of these passes; those that calibrate name the data `calibration`."""
    import torch
    from olive.data.component.dataset import BaseDataset
    from olive.data.registry import Registry
    from olive.workflows import run

    arrays = {n: torch.from_numpy(a) for n, a in samples(model, data).items()}
    rows = [({n: a[i] for n, a in arrays.items()}, 0) for i in range(len(next(iter(arrays.values()))))]

    @Registry.register_dataset("rows_of_npz")  # type: ignore[untyped-decorator]
    def rows_of_npz(**options: Any) -> Any:
        return BaseDataset(rows)

    run(
        {
            "input_model": {"type": "OnnxModel", "model_path": str(model)},
            "systems": {
                "here": {"type": "LocalSystem", "accelerators": [{"device": "cpu", "execution_providers": [CPU]}]}
            },
            "data_configs": [
                {
                    "name": "calibration",
                    "load_dataset_config": {"type": "rows_of_npz"},
                    "dataloader_config": {"batch_size": BATCH},
                }
            ],
            "passes": passes,
            "host": "here",
            "target": "here",
            "cache_dir": str(Path.cwd() / "cache"),
            "output_dir": str(folder),
            "no_artifacts": True,
        }
    )


def by_optimum(
    model: Path, data: Path, folder: Path, preset: str, *, static: bool, operators: list[str] | None = None
) -> None:
    """`ORTQuantizer` with a preset of `AutoQuantizationConfig`; `operators` are quantized as the text example does."""
    from datasets import Dataset
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoCalibrationConfig, AutoQuantizationConfig
    from optimum.onnxruntime.preprocessors import QuantizationPreprocessor
    from optimum.onnxruntime.preprocessors.passes import (
        ExcludeGeLUNodes,
        ExcludeLayerNormNodes,
        ExcludeNodeAfter,
        ExcludeNodeFollowedBy,
    )

    quantizer = ORTQuantizer.from_pretrained(model.parent, file_name=model.name)
    config = getattr(AutoQuantizationConfig, preset)(
        is_static=static, per_channel=True, **({"operators_to_quantize": operators} if operators else {})
    )
    ranges, kept = None, None
    if static:
        rows = Dataset.from_dict({n: list(a) for n, a in samples(model, data).items()}).with_format("numpy")
        ranges = quantizer.fit(
            dataset=rows, calibration_config=AutoCalibrationConfig.minmax(rows), batch_size=BATCH,
            operators_to_quantize=config.operators_to_quantize,
        )  # fmt: skip
    if operators:
        kept = QuantizationPreprocessor()
        for each in (
            ExcludeLayerNormNodes(), ExcludeGeLUNodes(), ExcludeNodeAfter("Add", "Add"),
            ExcludeNodeAfter("Gather", "Add"), ExcludeNodeFollowedBy("Add", "Softmax"),
        ):  # fmt: skip
            kept.register_pass(each)
    quantizer.quantize(config, save_dir=folder, calibration_tensors_range=ranges, preprocessor=kept)


def presets() -> tuple[str, ...]:
    """Those of `AutoQuantizationConfig` for this processor, the best first."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return ("arm64",)
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        if {"avx512_vnni", "avx_vnni"} & set(flags):
            return ("avx512_vnni",)
    return ("avx512_vnni", "avx2")


def recipes(products: bool) -> dict[str, Callable[[Path, Path, Path], None]]:
    """What is made, by label."""
    # The pass as it comes; the quantization of Olive's example of ResNet on a CPU; `olive quantize --implementation
    # ort`; and the passes of its example of BERT on a CPU.
    static = {"type": "OnnxStaticQuantization", "data_config": "calibration"}
    unsigned = {**static, "precision": "uint8", "activation_type": "uint8"}
    dynamic = {"type": "OnnxDynamicQuantization", "precision": "int8"}
    fused = {"type": "OrtTransformersOptimization", "model_type": "bert"}
    found: dict[str, Callable[[Path, Path, Path], None]] = {
        "Olive static": lambda m, d, f: by_olive(m, d, f, {"quantize": static}),
        "Olive static uint8": lambda m, d, f: by_olive(m, d, f, {"quantize": unsigned}),
        "Olive dynamic": lambda m, d, f: by_olive(m, d, f, {"quantize": dynamic}),
    }
    if products:
        found |= {
            "Olive fused static": lambda m, d, f: by_olive(m, d, f, {"fuse": fused, "quantize": static}),
            "Olive fused dynamic": lambda m, d, f: by_olive(m, d, f, {"fuse": fused, "quantize": dynamic}),
        }
    for index, preset in enumerate(presets()):
        name = "Optimum" if not index else f"Optimum {preset}"
        found |= {
            f"{name} static": lambda m, d, f, p=preset: by_optimum(m, d, f, p, static=True),  # type: ignore[misc]
            f"{name} dynamic": lambda m, d, f, p=preset: by_optimum(m, d, f, p, static=False),  # type: ignore[misc]
        }
        if products:
            found[f"{name} static text"] = lambda m, d, f, p=preset: by_optimum(  # type: ignore[misc]
                m, d, f, p, static=True, operators=["MatMul", "Add"]
            )
    return found


def only_file(folder: Path) -> Path:
    """The ONNX file that a recipe left.

    Raises:
        RuntimeError: There is not exactly one.
    """
    files = sorted(folder.rglob("*.onnx"))
    if len(files) != 1:
        raise RuntimeError(f"{len(files)} ONNX files were written")
    return files[0]


def make_one(label: str, model: Path, data: Path, folder: Path) -> None:
    """Carry out a recipe and run what came of it once."""
    import onnxruntime

    recipes(of_products(model))[label](model, data, folder)
    session = onnxruntime.InferenceSession(str(only_file(folder)), providers=[CPU])
    given = samples(model, data)
    session.run(None, {i.name: given[i.name][:1] for i in session.get_inputs()})


def reason(told: str) -> str:
    """Of a child's stderr, the line of the exception."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    ends = ("Error", "Exception", "Fail", "NotImplemented", "InvalidGraph", "InvalidProtobuf", "InvalidArgument")
    named = [line for line in lines if line.partition(":")[0].endswith(ends)]
    return (named or lines or ["it told nothing"])[-1][:200]


def make_all(model: Path, data: Path, folder: Path, timeout: float) -> dict[str, Any]:
    """Every recipe in a process of its own; what came of each."""
    report: dict[str, Any] = {"files": {}, "missing": {}, "seconds": {}}
    for label in recipes(of_products(model)):
        own = folder / label.replace(" ", "-")
        own.mkdir(parents=True, exist_ok=True)
        print(f"{label} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="foreign-") as scratch:
            child = subprocess.Popen(
                [sys.executable, __file__, str(model), str(data), str(own), "--only", label],
                cwd=scratch, env={**os.environ, **ALONE}, start_new_session=True, text=True, errors="replace",
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            try:
                told = child.communicate(timeout=timeout)[1]
                if child.returncode:
                    report["missing"][label] = f"exit {child.returncode}: {reason(told)}"
                else:
                    report["files"][label] = str(only_file(own))
            except subprocess.TimeoutExpired:
                report["missing"][label] = f"not done after {timeout:g} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
        report["seconds"][label] = round(time.monotonic() - began, 1)
    return report


def versions() -> dict[str, str]:
    """Of those of the packages that this environment has."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in (p.partition("==")[0] for p in PACKAGES):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def made_by(python: str, model: Path, data: Path, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Have that Python make the files; gives them and why others are not there."""
    try:
        subprocess.run(
            [python, __file__, str(model.resolve()), str(data.resolve()), str(folder.resolve())],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, subprocess.CalledProcessError) as exc:
        return {}, {"Olive and Optimum": f"{type(exc).__name__}: {str(exc)[:150]}"}
    return {label: Path(file) for label, file in report["files"].items()}, report["missing"]


def main() -> int:
    """Make the files and write what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for a recipe")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model, data, folder = (p.resolve() for p in (options.model, options.data, options.folder))
    if options.only:
        make_one(options.only, model, data, folder)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    report = {**make_all(model, data, folder, options.timeout), "versions": versions()}
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for label, seconds in report["seconds"].items():
        print(f"{label:22} {seconds:6.1f} s  {report['files'].get(label) or report['missing'][label]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
