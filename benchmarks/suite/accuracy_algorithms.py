"""What each accuracy algorithm is worth on trained models: python benchmarks/suite/accuracy_algorithms.py [NAME ...]

Quantizes each model of `real_models.py` statically, without and with each algorithm and with those that suit the model
together, and prints against float32 on the whole test set, in ONNX Runtime: the signal-to-noise ratio of the first
output (of MiniLM: of the embedding), the mean cosine, how often the same class is chosen, and the task's own metric.

`depthwise-100x` is the depthwise net with its channels scaled by factors from 1 to 100 between convolutions, such that
it computes the same: the net on which "MobileNetV2, 71.8 % to 0.1 %" of the literature happens. With `--static
'{"per_channel": false}'` it has one scale a weight, as there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import deploykit
from deploykit.data import Dataset
from deploykit.errors import DeploykitError
from deploykit.machine import inspect_machine
from deploykit.optimizers import StaticConfig, optimize
from deploykit.optimizers.editing import Editor
from deploykit.optimizers.folding import apply_edits, find_convolution
from deploykit.optimizers.prepare import prepare
from deploykit.optimizers.products import find_products
from deploykit.optimizers.sampling import sample_rows
from deploykit.progress import TerminalProgress
from deploykit.runtimes import open_session
from deploykit.weights import LightModel

_SUITE = Path(__file__).parent
sys.path.insert(0, str(_SUITE))
import real_models
from quantized_models import score

NAMES = ("residual", "depthwise", "depthwise-100x", "crepe", "minilm")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smooth": {"smooth": "auto"},
    "equalize": {"equalize": True},
    "fast": {"bias_correction": "fast"},
    "full": {"bias_correction": "full"},
    "adaround": {"rounding": "adaround"},
    "all but adaround": {"smooth": "auto", "equalize": True, "bias_correction": "full"},
}
_BATCH = 50
_HEADROOM = 1.25  # as in optimizers/equalize.py
Arrays = dict[str, np.ndarray]


def opener(path: Path) -> Callable[[Any], dict[str, np.ndarray]]:
    """Run a file with one thread: others work on this machine."""
    return open_session(path, "ort:cpu", threads=1).run


def outputs_of(path: Path, test: Arrays) -> list[np.ndarray]:
    """All outputs over the test set."""
    with open_session(path, "ort:cpu", threads=1) as session:
        names = [s.name for s in session.signature.outputs]
        count = len(test["labels"])
        found = [
            session.run({s.name: test[s.name][i : i + _BATCH] for s in session.signature.inputs})
            for i in range(0, count, _BATCH)
        ]
    return [np.concatenate([f[n] for f in found]) for n in names]


def unbalance(source: Path, target: Path, calibration: Arrays, spread: float) -> str:
    """Divide channels between convolutions by 1 to ``spread``, and multiply them where they are read."""
    proto, _ = prepare(onnx.load(source))
    light = LightModel(proto, source.parent)
    editor, draw = Editor(light), np.random.default_rng(0)
    products, _ = find_products(editor, [n.name for n in proto.graph.node])
    found = {
        p.name: (p, place)
        for p in products
        if p.window and len(editor.readers[p.data]) == 1 and (place := find_convolution(editor, p.data, 4))
    }

    def feeder() -> Iterator[Arrays]:
        for i in range(0, len(next(iter(calibration.values()))), _BATCH):
            yield {n: a[i : i + _BATCH] for n, a in calibration.items()}

    scaled = total = 0
    pairs = [product for product, _ in found.values()]
    for samples in sample_rows(light, pairs, feeder, opener, target.parent, limit=16):
        for name, sample in samples.items():
            product, place = found[name]
            # A channel that reaches Relu6's bound cannot be scaled.
            free = _HEADROOM * sample.high < place.bound
            factors = np.where(free, spread ** draw.random(len(free)), 1).astype(np.float32)
            if apply_edits(editor, place.edits, 1 / factors):
                matrix = product.matrix(editor.read(product.weight)) * product.per_input(factors)
                editor.write(product.weight, product.weight_from(matrix))
                scaled, total = scaled + int(free.sum()), total + len(free)
    onnx.save(proto, target)
    return f"{scaled} of {total} channels between {len(found)} pairs of convolutions scaled by 1 to {spread:g}"


def decibels(have: np.ndarray, want: np.ndarray) -> float:
    """Signal-to-noise ratio."""
    noise = np.square(have - want, dtype=np.float64).sum()
    return float(10 * np.log10(np.square(want, dtype=np.float64).sum() / max(noise, 1e-30)))


def cosine(have: np.ndarray, want: np.ndarray) -> float:
    """Mean over the samples."""
    lengths = np.linalg.norm(have, axis=1) * np.linalg.norm(want, axis=1)
    return float(np.mean((have * want).sum(1) / np.maximum(lengths, 1e-30)))


def parent_of(name: str, folder: Path, calibration: Arrays) -> Path:
    """The simplified float32 file."""
    np.savez(folder / "calibration.npz", **calibration)
    base, _, factor = name.partition("-")
    source = f"{_SUITE / 'real_models.py'}:{base}"
    exported = deploykit.export(source, folder / "exported", data=folder / "calibration.npz")
    file = deploykit.simplify(exported.path, folder / "fp32").path / "model.onnx"
    if factor:
        print(f"{name}: {unbalance(file, folder / 'unbalanced.onnx', calibration, float(factor[:-1]))}")
        return folder / "unbalanced.onnx"
    return file


def table(name: str, base: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    """Print a line for each variant, and give its figures."""
    calibration, test = getattr(real_models, f"{name.partition('-')[0]}_data")()
    with tempfile.TemporaryDirectory(prefix="accuracy-") as scratch:
        folder = Path(scratch)
        parent = parent_of(name, folder, calibration)
        before = outputs_of(parent, test)
        metric = score(name, before[0], test["labels"])
        print(f"\n{name}, {len(test['labels'])} test samples, static {json.dumps(base)}; float32: metric {metric:.4f}")
        print(f"{'':18} {'SQNR dB':>8} {'cosine':>8} {'same class':>10} {'metric':>8} {'seconds':>8}")
        for label, change in VARIANTS.items():
            if only and label not in only:
                continue
            target, started = folder / f"{label.replace(' ', '-')}.onnx", time.monotonic()
            try:
                made = optimize(
                    parent, StaticConfig(**(base | change)), target, check=lambda p: None, open_model=opener,
                    data=Dataset.from_arrays(calibration), progress=TerminalProgress(),
                )  # fmt: skip
            except DeploykitError as exc:
                print(f"{label:18} {exc}")
                continue
            seconds = time.monotonic() - started
            after = outputs_of(target, test)
            part = -1 if name == "minilm" else 0
            same = float(np.mean(after[0].argmax(1) == before[0].argmax(1)))
            figures = {
                "sqnr_db": decibels(after[part], before[part]), "cosine": cosine(after[part], before[part]),
                "same_class": same, "metric": score(name, after[0], test["labels"]), "seconds": seconds,
            }  # fmt: skip
            print(
                f"{label:18} {figures['sqnr_db']:8.2f} {figures['cosine']:8.5f} {same:10.4f} "
                f"{figures['metric']:8.4f} {seconds:8.1f}",
                flush=True,
            )
            for note in made.notes:
                print(f"{'':18} {note}")
            yield {"model": name, "static": base, "variant": label, "notes": made.notes, **figures}


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(NAMES))
    parser.add_argument("--static", metavar="JSON", default="{}", help="fields of StaticConfig for all variants")
    parser.add_argument("--only", metavar="VARIANT", action="append", default=[], help=", ".join(VARIANTS))
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    print(inspect_machine())
    figures = [row for name in options.names or NAMES for row in table(name, json.loads(options.static), options.only)]
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
