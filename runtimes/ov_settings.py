"""What may be set on OpenVINO, and what every device needs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from deploykit.errors import DeviceError
from deploykit.machine import allowed_cores
from deploykit.runtimes.base import SessionOptions
from deploykit.runtimes.device import Device

# Virtual devices that choose a real one; they exist wherever any device does.
VIRTUAL = ("AUTO", "MULTI", "HETERO", "BATCH")
# Properties that the core itself takes for any device.
_CORE = frozenset({
    "CACHE_DIR", "CACHE_MODE", "CACHE_ENCRYPTION_CALLBACKS", "ENABLE_MMAP", "FORCE_TBB_TERMINATE", "DEVICE_PROPERTIES",
    "ALLOW_AUTO_BATCHING", "AUTO_BATCH_TIMEOUT", "CONFIG_DEVICE_ID",
})  # fmt: skip


def configure(core: Any, device: Device, options: SessionOptions) -> dict[str, Any]:
    """The properties that a model is compiled with.

    Latency by default: one stream. Streams come by `NUM_STREAMS` or `PERFORMANCE_HINT`, never by both; `threads` are
    those of one request, so that n streams get n times as many, as far as there are cores.

    Raises:
        DeviceError: A property that does not exist or cannot be set, or two that contradict each other.
    """
    given = dict(options.extra or {})
    base, behind = _real(core, device)
    known = _known(core, (base, *behind))
    _check(device, given, known)
    if {"NUM_STREAMS", "PERFORMANCE_HINT"} <= given.keys():
        raise DeviceError(
            "NUM_STREAMS and PERFORMANCE_HINT both decide the number of streams", expected="one of the two"
        )
    config: dict[str, Any] = {} if "NUM_STREAMS" in given else {"PERFORMANCE_HINT": "LATENCY"}
    if options.precision == "fp32" and "INFERENCE_PRECISION_HINT" not in given:
        _check_single(core, device, behind or (base,))
        config["INFERENCE_PRECISION_HINT"] = "f32"
    cpu = _cpu_defaults(options, given)
    if base == "CPU":
        return config | cpu | given
    if base == "AUTO" and set(behind) - {"CPU"}:
        # It would begin on the CPU while another device gets ready, and go back there when that fails.
        config |= {"ENABLE_STARTUP_FALLBACK": False, "ENABLE_RUNTIME_FALLBACK": False}
    if not behind:
        return config | given
    return _spread(core, base, behind, config | given, cpu)


def _cpu_defaults(options: SessionOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    threads = options.threads or allowed_cores()
    if "NUM_STREAMS" in given:
        streams = given["NUM_STREAMS"]
        whole = isinstance(streams, int) or (isinstance(streams, str) and streams.isdecimal())
        wanted = threads * int(streams) if whole else allowed_cores()
        return {"INFERENCE_NUM_THREADS": threads if wanted == threads else min(wanted, max(threads, allowed_cores()))}
    if given.get("PERFORMANCE_HINT", "LATENCY") == "LATENCY":
        return {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    return {"INFERENCE_NUM_THREADS": threads}


def _real(core: Any, device: Device) -> tuple[str, tuple[str, ...]]:
    """The device's name without its number, and the real devices behind a virtual one."""
    base, _, rest = device.target.partition(":")
    if base not in VIRTUAL:
        return base.split(".")[0], ()
    listed = [name.split("(")[0] for name in rest.split(",") if name and not name.startswith("-")]
    # AUTO:-GPU is all but the GPU.
    without = [name[1:] for name in rest.split(",") if name.startswith("-")]
    found = [str(name) for name in core.available_devices]
    names = listed or [name for name in found if name not in without and name.split(".")[0] not in without]
    return base, tuple(dict.fromkeys(name.split(".")[0] for name in names))


def _known(core: Any, devices: Sequence[str]) -> dict[str, str]:
    """Properties of the devices, each "RO", "RW" or "WO"; empty where one of them does not tell."""
    found: dict[str, str] = {}
    for name in devices:
        try:
            properties = core.get_property(name, "SUPPORTED_PROPERTIES")
        except Exception:  # noqa: BLE001 - a device without the property is asked no further
            return {}
        for key, access in properties.items():
            if found.get(str(key)) != "RW":
                found[str(key)] = str(access)
    return found


def _check(device: Device, given: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """AUTO takes any property in silence, also a misspelt one."""
    for key in given if known else ():
        if key in _CORE or known.get(key) in ("RW", "WO"):
            continue
        if key in known:
            raise DeviceError(f"{key} of {device.target} can be read, not set")
        close = difflib.get_close_matches(key, [k for k, access in known.items() if access != "RO"], 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DeviceError(f"OpenVINO's {device.target} has no property {key!r}{hint}")


def _check_single(core: Any, device: Device, devices: Sequence[str]) -> None:
    """Refuse to promise single precision where the hardware has none (an NPU)."""
    for name in devices:
        try:
            can = [str(c) for c in core.get_property(name, "OPTIMIZATION_CAPABILITIES")]
        except Exception:  # noqa: BLE001 - a device that does not tell is believed
            continue
        if "FP16" in can and "FP32" not in can:
            raise DeviceError(
                f"{device.target} cannot compute in single precision ({name} has: {', '.join(can)})",
                hint="use --precision native",
            )


def _spread(
    core: Any, base: str, behind: Sequence[str], config: Mapping[str, Any], cpu: Mapping[str, Any]
) -> dict[str, Any]:
    """Hand a virtual device's properties on to the real ones, which it would not do with those it does not know."""
    own = _known(core, (base,))
    made = {key: value for key, value in config.items() if key in own or key in _CORE or not own}
    rest = {key: value for key, value in config.items() if key not in made}
    below: dict[str, dict[str, Any]] = {
        str(name): dict(values) for name, values in dict(made.pop("DEVICE_PROPERTIES", {})).items()
    }
    for name in behind:
        known = _known(core, (name,))
        extra = {key: value for key, value in rest.items() if known.get(key) in ("RW", "WO")}
        if name == "CPU":
            extra = {**cpu, **extra}
        if extra or name in below:
            below[name] = extra | below.get(name, {})
    if below:
        made["DEVICE_PROPERTIES"] = below
    return made
