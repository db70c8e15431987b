"""ONNX Runtime with inputs and outputs in buffers on the device (IOBinding)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deploykit.specs import Array, Feeds

# Where a provider keeps its tensors, by ONNX Runtime's name for the device; all others work in the host's memory.
_DEVICES = {
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "cuda",
    "ROCMExecutionProvider": "cuda",  # ROCm's devices go by the name of CUDA's
    "DmlExecutionProvider": "dml",
}

_NUMBERS = "fiub"  # kinds of dtypes whose arrays are plain memory


def device_of(provider: str, options: Mapping[str, str]) -> tuple[str, int]:
    """ONNX Runtime's name and number of the device whose memory a provider works in."""
    return _DEVICES.get(provider, "cpu"), int(options.get("device_id", 0))


class DeviceBinding:
    """Inputs and outputs of a session, bound to buffers on its device; for one thread at a time.

    Args:
        ort: The module `onnxruntime`.
        session: An `InferenceSession`.
        outputs: Names of the outputs, in order.
        device: As `device_of` gives it.
    """

    def __init__(self, ort: Any, session: Any, outputs: Sequence[str], device: tuple[str, int]) -> None:
        self._ort = ort
        self._session = session
        self._names = outputs
        self._device = device
        self._binding = session.io_binding()
        # The value that is bound, and the dtype and shape it was made for, by input.
        self._inputs: dict[str, tuple[Any, Any, tuple[int, ...]]] = {}

    def put(self, feeds: Feeds) -> None:
        """Copy inputs to the device; buffers of the size that is there already are used again."""
        kind, number = self._device
        for name, given in feeds.items():
            array = np.ascontiguousarray(given) if given.ndim else given
            held = self._inputs.get(name)
            if kind != "cpu" and held is not None and held[1:] == (array.dtype, array.shape):
                held[0].update_inplace(array)
                continue
            # On the CPU there is nothing to copy: the value is a view of the array, which it keeps alive.
            value = self._ort.OrtValue.ortvalue_from_numpy(array, kind, number)
            self._inputs[name] = value, array.dtype, array.shape
            self._binding.bind_ortvalue_input(name, value)

    def ask(self) -> None:
        """Have the outputs of the next run allocated on the device, in whatever shape they come."""
        for name in self._names:
            self._binding.bind_output(name, *self._device)

    def keep(self) -> None:
        """Have the next run write over the outputs of the latest one; for inputs of the same shapes."""
        for name, value in zip(self._names, self._binding.get_outputs(), strict=True):
            self._binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        """Run once and wait for the device."""
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def take(self) -> dict[str, Array]:
        """Copies of the outputs."""
        found = zip(self._names, self._binding.get_outputs(), strict=True)
        if self._device[0] == "cpu":  # `numpy()` would give the buffer itself
            return {name: value.numpy().copy() for name, value in found}
        return {name: value.numpy() for name, value in found}

    def request(self, feeds: Feeds) -> dict[str, Array]:
        """One whole request: copy in, run, copy out."""
        if feeds.keys() != {v.name for v in self._session.get_inputs()}:
            raise KeyError("one array an input")
        self.put(feeds)
        self.ask()
        self.run()
        return self.take()


class ReusedOutputs:
    """Runs a session on the CPU with its outputs in buffers that stay: for many or large outputs, read at once.

    `InferenceSession.run` copies every output into a new array, whose pages the system has to clear first; what looks
    at all of a network's activations spends much of its time on that.

    Args:
        ort: The module `onnxruntime`.
        session: An `InferenceSession` on the CPU.
        outputs: Names of the outputs, in order.
    """

    def __init__(self, ort: Any, session: Any, outputs: Sequence[str]) -> None:
        self._ort = ort
        self._session = session
        self._names = outputs
        self._mine = threading.local()

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run once, on any thread; the arrays hold until the same thread runs again.

        Args:
            feeds: Of the inputs' own dtypes.
        """
        shapes = tuple((name, array.shape) for name, array in feeds.items())
        if getattr(self._mine, "shapes", None) != shapes:
            return self._first(feeds, shapes)
        if self._mine.outputs is None:
            return self._plain(feeds)
        self._bind(self._mine.binding, feeds)
        try:
            self._session.run_with_iobinding(self._mine.binding)
        except Exception:  # noqa: BLE001 - whatever it is, a plain run fails of it too
            # Unless it is outputs that have other shapes for inputs of the same shapes: there is no buffer to keep.
            self._mine.outputs = self._mine.binding = None
            return self._plain(feeds)
        return dict(self._mine.outputs)

    def _first(self, feeds: Feeds, shapes: Any) -> dict[str, Array]:
        """Have the outputs allocated, and keep where they lie."""
        self._mine.outputs = self._mine.binding = None
        self._mine.shapes = shapes
        if not all(array.dtype.kind in _NUMBERS for array in feeds.values()):
            return self._plain(feeds)
        binding = self._session.io_binding()
        self._bind(binding, feeds)
        for name in self._names:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        values = binding.get_outputs()
        found = {name: value.numpy() for name, value in zip(self._names, values, strict=True)}
        # Strings are copied, and so might numbers be by another version: then the next run would not be seen in them.
        if all(
            a.dtype.kind in _NUMBERS and a.size and a.ctypes.data == v.data_ptr()
            for a, v in zip(found.values(), values, strict=True)
        ):
            for name, value in zip(self._names, values, strict=True):
                binding.bind_ortvalue_output(name, value)
            self._mine.outputs, self._mine.binding = found, binding
        return dict(found)

    def _bind(self, binding: Any, feeds: Feeds) -> None:
        """Have inputs read where they lie; the binding keeps them alive."""
        for name, array in feeds.items():
            given = np.ascontiguousarray(array) if array.ndim else array
            binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(given))

    def _plain(self, feeds: Feeds) -> dict[str, Array]:
        return dict(zip(self._names, self._session.run(None, dict(feeds)), strict=True))
