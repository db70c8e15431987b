"""What a profile, the file and the machine show by themselves: one rule a fault.

What has to be tried out is in `experiments`. A finding has to cost something: every rule has a threshold on its share
of the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from deploykit.benchmarks.findings import (
    HIGH,
    MEDIUM,
    Context,
    Finding,
    in_order,
    labels,
    micros,
    named,
    percent,
    severity,
)  # fmt: skip
from deploykit.benchmarks.profile import Kernel, Layer, Profile
from deploykit.benchmarks.roofline import position
from deploykit.runtimes.device import Device
from deploykit.runtimes.placement import is_compute

# A share of the time in all kernels from which a finding is worth a line.
_LEAST = 0.03
_PAIRS_LEAST = 0.1
# Shorter copies are not worth the work; the profiler alone takes some microseconds.
_COPIES_LEAST, _COPIES_MEDIUM, _COPY_US = 0.08, 0.15, 10.0
_SLOW_SHARE, _SLOW_OF_PEAK, _SLOW_US = 0.25, 0.04, 100.0
_OVERHEAD, _OVERHEAD_MEDIUM, _OVERHEAD_US = 0.4, 0.7, 1000.0
_MISSING_MEDIUM = 0.6
# Where products of int8 reach this much more than those of float32, int8 is worth having without a dot product too.
_INT8_PAYS = 1.1
_SHOWN = 4
_EXPLAINS = ("unfused-qdq", "signed-activations", "dynamic-convolution", "no-vnni")

_PAIR_OPS = ("QuantizeLinear", "DequantizeLinear", "FakeQuantize", "Quantize", "Dequantize")
_COPY_OPS = (
    "ReorderInput", "ReorderOutput", "Reorder", "MemcpyFromHost", "MemcpyToHost", "Cast", "Convert", "Transpose",
)  # fmt: skip
_COPY_CURES = (
    (("Memcpy",), "run neighbouring nodes on one device, and leave inputs and outputs there (I/O binding)"),
    (("Cast", "Convert"), "keep one element type: export in float32, or store 16 bits with: deploykit quantize half -m "
     "{model} -o DIR"),
    (("Transpose",), "export channels first, as convolutions want it, and fold the rest: deploykit simplify -m {model} "
     "-o DIR"),
    (("Reorder",), "let convolutions follow each other without operators between them that only know the plain layout; "
     "first try: deploykit simplify -m {model} -o DIR"),
)  # fmt: skip


Rule = Callable[[Profile, Context], Finding | None]


def find(profile: Profile, context: Context) -> list[Finding]:
    """All that the rules find, the gravest first."""
    found = [made for rule in RULES if (made := rule(profile, context)) is not None]
    # A layer whose slowness has a name already is not a riddle.
    explained = {name for f in found if f.kind in _EXPLAINS for name in f.nodes}
    return in_order([f for f in found if f.kind != "slow-kernel" or not explained.intersection(f.nodes)])


# --- where it runs ----------------------------------------------------------------------------------------------------


def misplaced(profile: Profile, context: Context) -> Finding | None:
    """Nodes that ran elsewhere than was asked."""
    off = [k for k in profile.kernels if k.on != profile.asked]
    share = profile.share(off)
    if not off or (share < _LEAST and len(off) < len(profile.kernels)):
        return None
    places = ", ".join(place or "an unknown place" for place in Counter(k.on for k in off))
    count = len(profile.kernels)
    return Finding(
        "wrong-provider", "high" if share >= HIGH or len(off) == count else "medium",
        f"{len(off)} of {count} nodes ran on {places} instead of {profile.asked}, {percent(share)} of the time: "
        f"{named(labels(off))}",
        f"measure where they really run (--device {_device_of(profile, off)}), or use operators that {profile.asked} "
        "has",
        labels(off), micros(off),
    )  # fmt: skip


def _device_of(profile: Profile, kernels: Sequence[Kernel]) -> str:
    """The device's name, as a command takes it, where the dearest of some kernels ran."""
    runtime, place = profile.device.partition(":")[0], max(kernels, key=lambda k: k.time_us).on.partition(",")[0]
    return str(Device(runtime, place)) if place else f"{runtime}:cpu"


def copies(profile: Profile, context: Context) -> Finding | None:
    """Kernels that only move data: layouts, types, devices."""
    moved = [k for k in profile.kernels if k.op in _COPY_OPS and k.time_us >= _COPY_US]
    share = profile.share(moved)
    if share < _COPIES_LEAST:
        return None
    spent: Counter[str] = Counter()
    for kernel in moved:
        spent[kernel.op] += round(kernel.time_us)
    dearest = spent.most_common(1)[0][0]
    cure = next(text for marks, text in _COPY_CURES if any(mark in dearest for mark in marks))
    kinds = ", ".join(f"{op} {us} us" for op, us in spent.most_common(_SHOWN))
    return Finding(
        "copies", severity(share, _COPIES_MEDIUM),
        f"{len(moved)} nodes only copy or convert, {percent(share)} of the time ({kinds}): {named(labels(moved))}",
        cure.format(model=context.model), labels(moved), micros(moved),
    )  # fmt: skip


def loaded(profile: Profile, context: Context) -> Finding | None:
    """Other processes wanted the cores that this one works on."""
    if not context.loaded or context.others is None:
        return None
    missing = context.others + context.threads - context.cores
    return Finding(
        "loaded-machine", "medium" if missing >= _MISSING_MEDIUM else "low",
        f"other processes kept {context.others:.1f} of {context.cores} cores busy while {context.threads} threads were "
        "measured",
        _without_others(context.cores - context.others),
    )  # fmt: skip


def _without_others(left: float) -> str:
    """What to do on a machine that others work on; pinning this process would keep nobody off its cores."""
    idle = "measure while nothing else runs"
    return f"{idle}, or with the threads that there are cores for: --threads {int(left)}" if left >= 1 else idle


# --- integers ---------------------------------------------------------------------------------------------------------


def unfused(profile: Profile, context: Context) -> Finding | None:
    """Q/DQ pairs that no integer kernel took."""
    pairs = _conversions(profile)
    floats = [
        k
        for k in profile.kernels
        if is_compute(k.op) and k.precision != "int8" and k.main is not None and k.main.quantized
    ]
    share = profile.share([*pairs, *floats])
    meant = [k for k in profile.kernels if is_compute(k.op) and k.main is not None and k.main.quantized]
    if share < _LEAST or not (meant or pairs):
        return None
    # Conversions around a layer that the file leaves in floating point belong to that finding.
    if not floats and (profile.share(pairs) < _PAIRS_LEAST or _left_in_float(profile)):
        return None
    parts = []
    if floats:
        parts.append(
            f"{len(floats)} of {len(meant)} layers that are int8 in the file are computed in floating point "
            f"({named(labels(floats))})"
        )
    if pairs:
        parts.append(f"{len(pairs)} conversions are left between layers ({named(labels(pairs))})")
    return Finding(
        "unfused-qdq", severity(share), f"{' and '.join(parts)}: {percent(share)} of the time",
        f"deploykit quantize repair -m {context.model} -o DIR; where that does not help, quantize the float model "
        "again: deploykit quantize static -m FLOAT_MODEL --data DATA -o DIR",
        labels([*floats, *pairs]), micros([*floats, *pairs]),
    )  # fmt: skip


def _conversions(profile: Profile) -> list[Kernel]:
    """Q/DQ pairs between layers: those of the model's ends are needed, and those of weights are another finding."""
    weights = _weight_conversions(profile)
    return [k for k in profile.kernels if k.op in _PAIR_OPS and not _at_boundary(k, profile) and k not in weights]


def _weight_conversions(profile: Profile) -> list[Kernel]:
    """Kernels that dequantize the weights of layers that are not meant for integers."""
    held = {w for k in profile.kernels for n in k.nodes if not n.quantized for w in n.weights}
    return [k for k in profile.kernels if "Dequantize" in k.op and any(held.intersection(n.inputs) for n in k.nodes)]


def _left_in_float(profile: Profile) -> list[Kernel]:
    """Layers with weights that the file itself keeps in floating point."""
    return [
        k
        for k in profile.kernels
        if is_compute(k.op) and k.precision != "int8" and k.main is not None and k.main.weights and not k.main.quantized
    ]


def _at_boundary(kernel: Kernel, profile: Profile) -> bool:
    """Whether it converts an input or an output of the model: that much is needed."""
    return any(profile.inputs.intersection(n.inputs) or profile.outputs.intersection(n.outputs) for n in kernel.nodes)


def signed_data(profile: Profile, context: Context) -> Finding | None:
    """Operators on int8 data, for which ONNX Runtime has no fast kernel on x86; pairs it turns into uint8 by itself."""
    found = [
        k
        for k in profile.kernels
        if k.on == "CPUExecutionProvider" and is_compute(k.op) and k.main is not None and k.main.signed
    ]
    share = profile.share(found)
    if not context.x86 or share < MEDIUM:
        return None
    return Finding(
        "signed-activations", severity(share),
        f"{len(found)} layers multiply int8 activations, {percent(share)} of the time; the x86 kernels of ONNX "
        f"Runtime want uint8: {named(labels(found))}",
        "quantize the float model again, to uint8 activations in Q/DQ pairs: deploykit quantize static -m FLOAT_MODEL "
        "--data DATA -o DIR",
        labels(found), micros(found),
    )  # fmt: skip


def weights_dequantized(profile: Profile, context: Context) -> Finding | None:
    """Weights that become floats anew in every run."""
    found = _weight_conversions(profile)
    share = profile.share(found)
    if share < _LEAST:
        return None
    return Finding(
        "weights-dequantized", severity(share),
        f"{len(found)} weights are turned into floats in every run, {percent(share)} of the time: "
        f"{named(labels(found))}",
        "store weights in blocks that a kernel reads as they are: deploykit quantize weights -m FLOAT_MODEL -o DIR; or "
        f"quantize activations too: deploykit quantize repair -m {context.model} -o DIR",
        labels(found), micros(found),
    )  # fmt: skip


def islands(profile: Profile, context: Context) -> Finding | None:
    """Float layers in a model that is int8 otherwise."""
    products = [k for k in profile.kernels if is_compute(k.op)]
    integers = [k for k in products if k.precision == "int8"]
    floats, pairs = _left_in_float(profile), _conversions(profile)
    share = profile.share([*floats, *pairs])
    if not integers or profile.share(floats) < MEDIUM:
        return None
    told = f" with the {len(pairs)} conversions between" if pairs else ""
    return Finding(
        "float-islands", severity(share, 0.15, 0.4),
        f"{len(floats)} of {len(products)} layers stayed in floating point among int8 ones, {percent(share)} of the "
        f"time{told}: {named(labels(floats))}",
        "quantize them too, unless accuracy forbids it: deploykit quantize static -m FLOAT_MODEL --data DATA -o DIR "
        "(the manifest says why a layer was left out)",
        labels(floats), micros([*floats, *pairs]),
    )  # fmt: skip


def no_dot_product(profile: Profile, context: Context) -> Finding | None:
    """int8 on a CPU that has no instruction for it."""
    integers = [k for k in profile.kernels if is_compute(k.op) and k.precision == "int8"]
    share = profile.share(integers)
    if context.int8_dot or share < MEDIUM:
        return None
    told, pays = "", False
    if context.peaks.int8_gops and context.peaks.fp32_gflops:
        ratio = context.peaks.int8_gops / context.peaks.fp32_gflops
        told, pays = f" (int8 products reach {ratio:.1f}x of float32 here)", ratio >= _INT8_PAYS
    cure = (
        f"measure it beside the float model: deploykit benchmark -m FLOAT_MODEL -m {context.model}; int8 gains more on "
        "a CPU with VNNI"
        if pays
        else "run the float model on this machine, or int8 on one with VNNI"
    )
    if context.x86:
        cure += (
            "; products of 8 bits saturate here, those of 7-bit weights do not: deploykit quantize static "
            "--weight-bits 7 -m FLOAT_MODEL --data DATA -o DIR"
        )
    return Finding(
        "no-vnni", "low" if pays else "high" if share >= HIGH else "medium",
        f"{len(integers)} int8 layers, {percent(share)} of the time, on a CPU without VNNI, AMX or another 8-bit dot "
        f"product{told}: {named(labels(integers))}",
        cure, labels(integers), micros(integers),
    )  # fmt: skip


def dynamic_convolutions(profile: Profile, context: Context) -> Finding | None:
    """Convolutions whose activations are quantized while the model runs."""
    found = [k for k in profile.kernels if k.op == "ConvInteger"]
    with_conversions = [k for k in profile.kernels if k.op == "DynamicQuantizeLinear"]
    share = profile.share([*found, *with_conversions])
    if not found or share < MEDIUM:
        return None
    return Finding(
        "dynamic-convolution", severity(share),
        f"{len(found)} convolutions are quantized dynamically, {percent(share)} of the time with their conversions; "
        f"that kernel is not an optimized one: {named(labels(found))}",
        "quantize convolutions statically: deploykit quantize static -m FLOAT_MODEL --data DATA -o DIR",
        labels(found), micros([*found, *with_conversions]),
    )  # fmt: skip


# --- kernels ----------------------------------------------------------------------------------------------------------


def overhead(profile: Profile, context: Context) -> Finding | None:
    """A model so small that calling it is what costs."""
    whole_us = profile.quick_us
    if not profile.kernels or not 0 < whole_us <= _OVERHEAD_US:
        return None
    useful = sum(k.time_us for k in profile.kernels if _placed(k, context) != "overhead")
    lost = max(0.0, 1 - useful / whole_us)
    if lost < _OVERHEAD:
        return None
    return Finding(
        "overhead", "medium" if lost >= _OVERHEAD_MEDIUM else "low",
        f"a quick run takes {whole_us:.0f} us, and {min(useful, whole_us):.0f} us of it are in kernels that are long "
        "enough to matter: starting them is what costs",
        f"put more samples into one run (deploykit benchmark -m {context.model} --batch 32), and try --threads 1",
        (), round(lost * whole_us, 1),
    )  # fmt: skip


def _placed(kernel: Kernel, context: Context) -> str | None:
    macs = kernel.main.macs if kernel.main is not None and is_compute(kernel.op) else 0
    return position(macs, kernel.moved_bytes, kernel.time_us, kernel.precision, context.peaks).bound


def slow_layer(profile: Profile, context: Context) -> Finding | None:
    """One layer that takes much of the time and is far from every roof."""
    for layer in profile.layers:
        share = profile.share(layer.kernels)
        if share < _SLOW_SHARE or layer.time_us < _SLOW_US:
            return None
        of_peak = _of_peak(layer, context)
        if of_peak is None or of_peak >= _SLOW_OF_PEAK:
            continue
        kernel = layer.kernels[0]
        return Finding(
            "slow-kernel", "high" if share >= 2 * HIGH else "medium",
            f"{layer.name} ({layer.op}, as {kernel.op} in {kernel.precision or 'an unknown type'}) takes "
            f"{percent(share)} of the time at {percent(of_peak)} of what this machine can do: its kernel is not "
            "optimized for this case",
            "compare runtimes (--device ort:cpu --device openvino:cpu), or write the layer with operators that have "
            "fast kernels (plain Conv and MatMul, float32 or int8, no odd strides, dilations or groups)",
            (layer.name,), round(layer.time_us * (1 - of_peak), 1),
        )  # fmt: skip
    return None


def _of_peak(layer: Layer, context: Context) -> float | None:
    return position(layer.macs, layer.moved_bytes, layer.time_us, layer.precision, context.peaks).of_peak


RULES: tuple[Rule, ...] = (
    misplaced, unfused, signed_data, weights_dequantized, islands, no_dot_product, dynamic_convolutions, copies,
    slow_layer, overhead, loaded,
)  # fmt: skip
