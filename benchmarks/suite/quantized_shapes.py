"""int8 against the peers on well-known shapes: python benchmarks/suite/quantized_shapes.py [NAME ...] [--batch N ...]

ResNet-50, MobileNetV2 and ViT-tiny with random weights, which serve for speed only, and MiniLM with its own. Files of
float32, of onnxruntime's static defaults, of onnxruntime with uint8 activations and int8 weights by channel, of NNCF as
it comes, and of DeployKit are timed in one interleaved run a model and batch, each in a fresh process a round. Printed
are the speed as a ratio to float32 in ONNX Runtime with its interval, how many layers run in int8, and the cosine of
the outputs to float32's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import deploykit
from deploykit.machine import inspect_machine
from deploykit.progress import TerminalProgress
from deploykit.proof import prove_placement
from deploykit.runtimes import open_session, require_device

NAMES = ("resnet50", "mobilenetv2", "vit-tiny", "minilm")
DEVICES = ("ort:cpu", "openvino:cpu")
IMAGES, WIDTH = 64, 64


def network(name: str) -> tuple[Any, Any]:
    """A module and an example; batch statistics are those of the images."""
    import torch
    from transformers import (
        MobileNetV2Config,
        MobileNetV2ForImageClassification,
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )  # fmt: skip

    torch.manual_seed(0)
    made: Any = {
        "resnet50": lambda: ResNetForImageClassification(ResNetConfig(num_labels=1000)),
        "mobilenetv2": lambda: MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000)),
        "vit-tiny": lambda: ViTForImageClassification(
            ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=1000)
        ),
    }[name]()
    example = torch.from_numpy(pictures(8))
    with torch.no_grad():
        for _ in range(3):
            made.train()(example)
    return made.eval(), example


def pictures(count: int) -> np.ndarray:
    """Patches of colour, float32 [count, 3, 224, 224]."""
    draw = np.random.default_rng(0)
    coarse = draw.standard_normal((count, 3, 14, 14))
    fine = coarse.repeat(16, 2).repeat(16, 3) + 0.3 * draw.standard_normal((count, 3, 224, 224))
    return fine.astype(np.float32)


def resnet50() -> tuple[Any, Any]:
    """For `deploykit export`."""
    return network("resnet50")


def mobilenetv2() -> tuple[Any, Any]:
    """For `deploykit export`."""
    return network("mobilenetv2")


def vit_tiny() -> tuple[Any, Any]:
    """For `deploykit export`."""
    return network("vit-tiny")


def sentences() -> dict[str, np.ndarray]:
    """Lines of text, padded; see `real_models`."""
    sys.path.insert(0, str(Path(__file__).parent))
    import real_models

    found = real_models._tokens(real_models.rated_lines()[0][:IMAGES], WIDTH)
    return {**found, "token_type_ids": np.zeros_like(found["input_ids"])}


class Reader:
    """Calibration data as onnxruntime reads them."""

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        count = len(next(iter(data.values())))
        self._feeds = iter([{n: a[i : i + 8] for n, a in data.items()} for i in range(0, count, 8)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def prepared(model: Path, target: Path) -> Path:
    """onnxruntime's own pre-processing, where it works."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        quant_pre_process(str(model), str(target))
    except Exception:
        return model
    return target


def by_onnxruntime(model: Path, target: Path, data: dict[str, np.ndarray], **options: Any) -> None:
    """Static quantization as onnxruntime's documentation does it."""
    from onnxruntime.quantization import quantize_static

    quantize_static(str(prepared(model, target.with_suffix(".pre.onnx"))), str(target), Reader(data), **options)


def tuned(model: Path, target: Path, data: dict[str, np.ndarray]) -> None:
    """What its experts advise: uint8 activations, int8 weights by channel, products and convolutions only."""
    from onnxruntime.quantization import QuantType

    by_onnxruntime(
        model, target, data, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        **({"op_types_to_quantize": ["MatMul", "Gemm"]} if "input_ids" in data else {}),
    )  # fmt: skip


def by_nncf(model: Path, target: Path, data: dict[str, np.ndarray], *, transformer: bool) -> None:
    """NNCF with its recommended settings; the file as it comes."""
    import nncf
    import onnx

    count = len(next(iter(data.values())))
    feeds = [{n: a[i : i + 1] for n, a in data.items()} for i in range(count)]
    made = nncf.quantize(
        onnx.load(str(model)), nncf.Dataset(feeds), subset_size=count,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )  # fmt: skip
    onnx.save(made, str(target))


def make(name: str, folder: Path) -> tuple[dict[str, Path], dict[str, str], dict[str, np.ndarray]]:
    """Every file, why others are not there, and the data."""
    told = TerminalProgress()
    if name == "minilm":
        import real_models

        data = sentences()
        source = str(real_models._minilm_folder())
    else:
        data = {"pixel_values": pictures(IMAGES)}
        source = f"{Path(__file__)}:{name.replace('-', '_')}"
    np.savez(folder / "data.npz", **data)
    given = {} if name == "minilm" else {"data": folder / "data.npz"}
    deploykit.export(source, folder / "raw", progress=told, **given)  # type: ignore[arg-type]
    fp32 = deploykit.simplify(folder / "raw", folder / "fp32", progress=told)
    model = fp32.model_path
    names = [s.name for s in fp32.signature.inputs]
    data = {n: a for n, a in data.items() if n in names}
    transformer = name in ("vit-tiny", "minilm")
    steps: dict[str, Callable[[Path], Any]] = {
        "onnxruntime defaults": lambda out: by_onnxruntime(model, out, data),
        "onnxruntime tuned": lambda out: tuned(model, out, data),
        "NNCF": lambda out: by_nncf(model, out, data, transformer=transformer),
        "deploykit": lambda out: deploykit.quantize_static(
            fp32.path, out.with_suffix(""), data=folder / "data.npz", min_cosine=-1, gate_seconds=0, progress=told
        ),
    }
    files, missing = {"fp32": model}, {}
    for label, step in steps.items():
        out = folder / f"{label.replace(' ', '-')}.onnx"
        try:
            step(out)
            files[label] = out if out.exists() else out.with_suffix("") / "model.onnx"
        except Exception as exc:
            missing[label] = f"{type(exc).__name__}: {str(exc)[:150]}"
    return files, missing, data


def cosine(files: dict[str, Path], label: str, data: dict[str, np.ndarray], device: str) -> float:
    """Of the first output to float32's, the mean over 8 samples."""
    feeds = {n: a[:8] for n, a in data.items()}
    found = []
    for file in (files["fp32"], files[label]):
        with open_session(file, device) as session:
            values = next(iter(session.run({s.name: feeds[s.name] for s in session.signature.inputs}).values()))
        if "attention_mask" in feeds and values.ndim == 3:
            mask = feeds["attention_mask"][..., None]
            values = (values * mask).sum(1) / mask.sum(1)
        found.append(values.reshape(len(values), -1).astype(np.float64))
    norms = np.linalg.norm(found[0], axis=1) * np.linalg.norm(found[1], axis=1)
    return float(((found[0] * found[1]).sum(1) / norms).mean())


def share(file: Path, device: str) -> str:
    """How many layers run in int8."""
    proof = prove_placement(file, require_device(device), {})["layers"] or {}
    return f"{sum(n['int8'] for n in proof.values())}/{sum(n['total'] for n in proof.values())}"


def main() -> int:
    """Print a table for each model and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(NAMES))
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    print(inspect_machine())
    figures: list[dict[str, Any]] = []
    for name in options.names or NAMES:
        with tempfile.TemporaryDirectory(prefix="shapes-") as scratch:
            folder = Path(scratch)
            files, missing, data = make(name, folder)
            for batch in options.batch:
                report = deploykit.benchmark(
                    list(files.values()), devices=DEVICES, data=folder / "data.npz", batch=batch,
                    rounds=options.rounds, seconds=options.seconds, warmup_s=0.3, min_cosine=-1,
                    progress=TerminalProgress(),
                )  # fmt: skip
                print(f"\n{name}, batch {batch}; noise floor {report.data['noise_floor']:.1%}")
                print(
                    f"{'':22} {'MB':>6} " + " ".join(f"{d + ' cosine':>19} {'speed':>19} {'int8':>7}" for d in DEVICES)
                )
                for label, file in files.items():
                    cells = []
                    for device in DEVICES:
                        entry = report.candidates[list(files).index(label) * len(DEVICES) + DEVICES.index(device)]
                        against = entry.get("against_reference") or {"ratio": 1.0, "low": 1.0, "high": 1.0}
                        speed = f"{against['ratio']:.2f} [{against['low']:.2f}, {against['high']:.2f}]"
                        if "median_ms" not in entry:
                            speed = entry["status"][:19]
                        near = cosine(files, label, data, device)
                        cells.append(f"{near:19.4f} {speed:>19} {share(file, device):>7}")
                        figures.append(
                            {"model": name, "batch": batch, "file": label, "device": device, "cosine": near, **against}
                        )
                    size = sum(f.stat().st_size for f in file.parent.glob(f"{file.name}*")) / 1e6
                    print(f"{label:22} {size:6.1f} " + " ".join(cells), flush=True)
                for label, why in missing.items():
                    print(f"{label:22} {why}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
