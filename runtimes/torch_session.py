"""PyTorch as a baseline: exported programs (`.pt2`), operator by operator or through `torch.compile`."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import DeploykitError, DeviceError, InferenceError, ModelError, first_line
from deploykit.extras import available, require
from deploykit.programs import load_program, read_inputs, read_outputs
from deploykit.runtimes.base import Session, SessionOptions, check_dtypes, dtypes_of
from deploykit.runtimes.device import Device
from deploykit.runtimes.placement import ExecutedNode, Placement
from deploykit.runtimes.requests import Bound
from deploykit.runtimes.torch_profile import profiled_nodes
from deploykit.specs import Array, Feeds, Signature

# Sessions that are open, in the order of their opening.
_NUMBERS = itertools.count()
_OPEN: weakref.WeakValueDictionary[int, TorchSession] = weakref.WeakValueDictionary()
# Arguments of torch.compile that may be set.
_COMPILE = ("backend", "mode", "fullgraph", "dynamic", "options")


def check_torch(device: Device) -> None:
    """Refuse a device that PyTorch does not have, and torch.compile without a compiler.

    Raises:
        DeviceError: As said.
        MissingDependencyError: torch is not installed.
    """
    torch = require("torch", extra="torch")
    kind, _, number = device.target.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) >= count:
            raise DeviceError(
                f"torch {torch.__version__} finds no {device.target} (it finds {count} CUDA devices)",
                hint="install a build of torch for CUDA and the driver, or choose another --device",
            )
    if device.runtime != "torch-compile":
        return
    if kind == "cuda":
        if not available("triton"):
            raise DeviceError("torch.compile needs triton on CUDA", hint="run: pip install triton")
        return
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        raise DeviceError(
            f"torch.compile needs a C++ compiler, and there is no {compiler}", hint="install one, or name it in CXX"
        )


class TorchSession(Session):
    """An exported program in PyTorch, under `torch.inference_mode`.

    The number of threads and the precision of float32 products belong to the whole process: `threads` is set again for
    a run where another session changed it, the precision holds from opening on; both are put back when the last of the
    sessions that were opened since is closed.

    Args:
        path: The `.pt2` file, which `torch.export.save` wrote.
        device: With runtime "torch" or "torch-compile"; the latter compiles in the first run.
        options: Threads and the like; `extra` holds arguments of `torch.compile`: backend, mode, fullgraph, dynamic,
            options.
    """

    def __init__(self, path: Path, device: Device, options: SessionOptions) -> None:
        torch = require("torch", extra="torch")
        if path.suffix not in device.reads:
            raise ModelError(
                f"PyTorch cannot read {path}",
                expected="a .pt2 file of torch.export.save",
                hint="use another --device, such as ort:cpu",
            )
        check_torch(device)
        self.device = device
        self._path = path
        self._torch = torch
        self._compiles = device.runtime == "torch-compile"
        extra = dict(options.extra or {})
        self._check(options, extra)
        program = load_program(path)
        if device.target != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device.target)
        inputs = read_inputs(program)
        outputs, self._picks = read_outputs(program, inputs)
        self.signature = Signature(inputs.specs, outputs)
        self._names = [spec.name for spec in outputs]
        self._graph = program.graph
        self._slots = inputs.slots
        self._limits = dict(inputs.limits)
        self._dtypes = dtypes_of(inputs.specs)
        self._written = _written_inputs(program)
        module = _flat_module(program)
        # Outputs that lie in these may not be handed out: the caller would write into the model.
        self._own = {t.untyped_storage().data_ptr() for t in (*module.state_dict().values(), *module.buffers())}
        self._own |= {t.untyped_storage().data_ptr() for t in program.constants.values() if hasattr(t, "layout")}
        self._module = self._compiled(module, extra) if self._compiles else module
        self._threads = options.threads
        self._before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        self._number = next(_NUMBERS)
        _OPEN[self._number] = self
        self.settings = {"num_threads": options.threads, **extra}
        if options.precision == "fp32":
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
            self.settings["float32_matmul_precision"] = "highest"

    def _check(self, options: SessionOptions, extra: Mapping[str, Any]) -> None:
        allowed = _COMPILE if self._compiles else ()
        unknown = next((key for key in extra if key not in allowed), None)
        if unknown is not None:
            raise DeviceError(f"{self.device} has no setting {unknown!r}", expected=", ".join(allowed) or "none")
        if isinstance(options.optimize, str) or (self._compiles and not options.optimize):
            what = "torch.compile always optimizes the graph" if self._compiles else "PyTorch never optimizes a graph"
            raise DeviceError(f"{what}: optimize {options.optimize!r}", hint="use --device torch:cpu or ort:cpu")

    def _compiled(self, module: Any, extra: Mapping[str, Any]) -> Any:
        torch = self._torch
        try:
            if isinstance(backend := extra.get("backend", "inductor"), str):
                import torch._dynamo as dynamo

                if backend not in dynamo.list_backends(exclude_tags=None):
                    raise ValueError(f"no backend {backend!r}")
            return torch.compile(module, **extra)
        except Exception as exc:
            raise DeviceError(f"torch.compile refuses its settings ({first_line(exc)})") from exc

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        tensors = self._tensors(feeds)
        return self._arrays(self._call(tensors), tensors)

    def _tensors(self, feeds: Feeds) -> list[Any]:
        if len(feeds) != len(self._dtypes):
            raise KeyError("one array an input")
        check_dtypes(self._dtypes, feeds)
        self._check_sizes(feeds)
        return [self._tensor(name, feeds[name]) for name, _ in self._dtypes]

    def _check_sizes(self, feeds: Feeds) -> None:
        """What the program's own guards would check, which cost more than a small model."""
        sizes: dict[str, int] = {}
        for spec in self.signature.inputs:
            shape = feeds[spec.name].shape
            wanted = spec.shape or ()
            if len(shape) != len(wanted):
                raise ValueError(f"{spec.name} has {len(shape)} dimensions, not {len(wanted)}")
            for dim, size in zip(wanted, shape, strict=True):
                if dim != size and (isinstance(dim, int) or sizes.setdefault(dim, size) != size):
                    raise ValueError(f"{spec.name} has shape {shape}, not {wanted}")
        for symbol, size in sizes.items():
            low, high = self._limits.get(symbol, (0, size))
            if not low <= size <= high:
                raise ValueError(f"{symbol} is {size}, and the program takes {low} to {high}")

    def _tensor(self, name: str, array: Array) -> Any:
        """A tensor over the array's own memory where that does no harm, or on the device."""
        torch = self._torch
        if not array.flags.writeable or name in self._written or any(stride < 0 for stride in array.strides):
            array = np.array(array, order="C")
        if array.dtype.name == "bfloat16":
            tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        return tensor if self.device.target == "cpu" else tensor.to(self.device.target)

    def _call(self, tensors: Sequence[Any]) -> list[Any]:
        """Run, and wait where the device works on its own."""
        torch = self._torch
        if self._module is None:
            raise RuntimeError("the session is closed")
        if self._threads and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        left = iter(tensors)
        leaves = [next(left) if isinstance(slot, str) else slot[0] for slot in self._slots]
        with torch.inference_mode():
            found = self._module(*leaves)
        self._wait()
        return [found[i] for i in self._picks]

    def _wait(self) -> None:
        if self.device.target != "cpu":
            self._torch.cuda.synchronize(self.device.target)

    def _arrays(self, outputs: Sequence[Any], inputs: Sequence[Any]) -> dict[str, Array]:
        """Arrays that nothing else lies in: neither an input, nor a weight, nor another output."""
        host = self.device.target == "cpu"
        seen = {t.untyped_storage().data_ptr() for t in inputs} if host else set()
        made = {}
        for name, output in zip(self._names, outputs, strict=True):
            if not host:
                output = output.cpu()
            place = output.untyped_storage().data_ptr()
            if place in seen or place in self._own:
                output = output.clone()
            seen.add(place)
            made[name] = self._array(output.detach() if output.requires_grad else output)
        return made

    def _array(self, tensor: Any) -> Array:
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        if tensor.dtype == self._torch.bfloat16:
            bits: Array = tensor.view(self._torch.int16).numpy()
            return bits.view(require("ml_dtypes").bfloat16)
        found: Array = tensor.numpy()
        return found

    def _request(self) -> Callable[[Feeds], dict[str, Array]]:
        return self._run

    def _bind(self, feeds: Feeds) -> Bound:
        tensors = self._tensors(feeds)
        latest: list[Any] = []

        def run() -> None:
            latest[:] = self._call(tensors)

        run()
        return Bound(self, feeds, run, lambda: {k: v.copy() for k, v in self._arrays(latest, tensors).items()})

    def _translate(self, exc: Exception) -> Exception:
        if isinstance(exc, DeploykitError):
            return exc
        return InferenceError(f"PyTorch failed while it ran {self._path} ({first_line(exc)})")

    def _placement(self, feeds: Feeds, runs: int) -> Placement:
        tensors = self._tensors(feeds)
        nodes = profiled_nodes(self._torch, lambda: self._call(tensors), self.device.target, runs)
        return Placement(self.device.target, nodes)

    def _executed(self) -> tuple[ExecutedNode, ...]:
        """The program's own operators: PyTorch fuses nothing; what torch.compile makes of them it does not show."""
        if self._compiles:
            raise InferenceError("torch.compile does not show the graph that it made", hint="use --device torch:cpu")
        return tuple(self._operators())

    def _operators(self) -> Iterator[ExecutedNode]:
        for node in self._graph.nodes:
            if node.op != "call_function":
                continue
            value = node.meta.get("val")
            dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
            namespace, _, rest = str(node.target).partition(".")
            yield ExecutedNode(node.name, f"{namespace}::{rest.split('.')[0]}", dtype, frozenset({node.name}))

    def close(self) -> None:
        """Free the model, and put back what belongs to the process."""
        if self._module is None:
            return
        self._module = self._graph = None
        _OPEN.pop(self._number, None)
        younger = [session for number, session in sorted(_OPEN.items()) if number > self._number]
        if younger:  # it needs what it found; what was before this one, it puts back in its turn
            younger[0]._before = self._before
            return
        threads, precision, tf32 = self._before
        self._torch.set_num_threads(threads)
        self._torch.set_float32_matmul_precision(precision)
        self._torch.backends.cudnn.allow_tf32 = tf32


def _flat_module(program: Any) -> Any:
    """The program's module with its inputs and outputs in a row: no nests are taken apart and no guards run.

    With them, a call costs three times what the operators of a tiny model take, and no user's module pays that.
    """
    from torch.fx.graph import CodeGen

    module = program.module(check_guards=False)
    module.graph.set_codegen(CodeGen())
    module.recompile()
    module._forward_pre_hooks.clear()
    return module


def _written_inputs(program: Any) -> set[str]:
    """Inputs that the program writes into, itself or through a view of them: they need a copy of the caller's array."""
    found = set(program.graph_signature.user_inputs_to_mutate.values())
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        written = [a for a, given in zip(node.args, schema.arguments, strict=False) if given.is_write]
        written += [node.kwargs.get(a.name) for a in schema.arguments if a.is_write and a.name in node.kwargs]
        left = [a for a in written if hasattr(a, "op")]
        while left:
            source = left.pop()
            if source.op == "placeholder":
                found.add(source.name)
            elif _is_view(source):
                left += source.all_input_nodes
    return found


def _is_view(node: Any) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)
