"""Datasets: named arrays, read in batches, and inputs made up where there are none.

The first axis of every array counts the samples. Labels stand under the reserved name `labels`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np

from deploykit.errors import DataError, DeploykitError, SourceError, first_line
from deploykit.pictures import is_picture, make_pictures
from deploykit.specs import Array, Dim, Signature, TensorSpec

LABELS = "labels"
_STANDARD_LIBRARY = str(Path(contextlib.__file__).parent)
_FORMS = "FILE.npz, a directory of .npy files, or module:function"


@dataclass(frozen=True, slots=True)
class ValueRange:
    """Values that an input may take: integers in [low, high], or normally distributed reals.

    Attributes:
        low: Smallest value (integers), or mean minus one standard deviation (reals).
        high: Largest value (integers), or mean plus one standard deviation (reals).
    """

    low: float
    high: float


class Dataset:
    """Named arrays in batches, lazily.

    Args:
        source: What is read, for messages and manifests.
        batches: Called with the batch size; yields dictionaries of arrays with equal first axes.
        length: Number of samples; None where only reading tells.
        names: Names of the arrays, `labels` included; None where only reading tells.
    """

    def __init__(
        self,
        source: str,
        batches: Callable[[int], Iterator[dict[str, Array]]],
        *,
        length: int | None = None,
        names: tuple[str, ...] | None = None,
    ) -> None:
        self.source = source
        self.length = length
        self.names = names
        self._batches = batches

    @classmethod
    def open(cls, source: str | Path) -> Dataset:
        """Open `FILE.npz`, a directory of `.npy` files, or `module:function` (`file.py:function`).

        The function returns a dictionary of arrays, or yields dictionaries, one a batch.

        Raises:
            DataError: Nothing there, unreadable, of unequal lengths, or empty.
        """
        text = str(source)
        path = Path(text)
        if path.is_dir():
            return _from_directory(path)
        if path.is_file():
            if path.suffix != ".npz":
                raise DataError(f"{path} is not a dataset", expected=_FORMS)
            return _from_npz(path)
        if path.suffix == ".npz" or ":" not in text:
            raise DataError(f"dataset {text} does not exist", expected=_FORMS)
        return _from_function(text)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], source: str = "memory") -> Dataset:
        """A dataset over arrays in memory.

        Raises:
            DataError: Lengths differ, or there is nothing.
        """
        length = _common_length(source, {k: np.asarray(v) for k, v in arrays.items()})
        return cls(source, lambda size: _slices(arrays, length, size), length=length, names=tuple(arrays))

    @property
    def has_labels(self) -> bool | None:
        """Whether there are labels; None where only reading tells."""
        return None if self.names is None else LABELS in self.names

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Batches of at most ``size`` samples; each a dictionary of arrays of shape [n, ...].

        Raises:
            DataError: The source fails while it is read.
        """
        if size < 1:
            raise DataError(f"batch size {size}", expected="1 or more")
        yield from self._batches(size)

    def head(self, count: int) -> dict[str, Array]:
        """The first ``count`` samples, or all where there are fewer.

        Raises:
            DataError: There is none, or the batches of a function do not fit together.
        """
        parts: list[dict[str, Array]] = []
        found = 0
        for batch in self.batches(count):
            parts.append(batch)
            found += len(next(iter(batch.values())))
            if found >= count:
                break
        if not parts:
            raise DataError(f"{self.source} holds no samples")
        if len(parts) == 1:
            return {name: array[:count] for name, array in parts[0].items()}
        try:
            return {name: np.concatenate([p[name] for p in parts])[:count] for name in parts[0]}
        except (KeyError, ValueError) as exc:
            raise DataError(
                f"{self.source}: batches do not fit together ({first_line(exc)})",
                expected="the same names and, but for the first axis, the same shapes in every batch",
            ) from exc


def _common_length(source: str, arrays: Mapping[str, Any]) -> int:
    if not arrays:
        raise DataError(f"{source} holds no arrays", expected="one array an input")
    flat = [name for name, a in arrays.items() if len(a.shape) == 0]
    if flat:
        raise DataError(f"{source}: {flat[0]!r} is a scalar", expected="the samples along the first axis")
    lengths = {name: int(a.shape[0]) for name, a in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"{source}: arrays of different lengths {lengths}", expected="one row a sample in every array")
    length = next(iter(lengths.values()))
    if length == 0:
        raise DataError(f"{source} holds no samples")
    return length


def _slices(arrays: Mapping[str, Array], length: int, size: int) -> Iterator[dict[str, Array]]:
    for start in range(0, length, size):
        yield {name: np.asarray(a[start : start + size]) for name, a in arrays.items()}


def _from_directory(path: Path) -> Dataset:
    files = sorted(path.glob("*.npy"))
    if not files:
        raise DataError(f"{path} holds no .npy files", expected=_FORMS)
    arrays: dict[str, Array] = {}
    for file in files:
        try:
            # Not numpy.load, which would take an .npz, or a pickle, under this name.
            arrays[file.stem] = np.lib.format.open_memmap(file, mode="r")
        except (ValueError, OSError, EOFError) as exc:
            raise DataError(f"cannot read {file} ({first_line(exc)})", expected="a .npy file without objects") from exc
    length = _common_length(str(path), arrays)
    return Dataset(str(path), lambda size: _slices(arrays, length, size), length=length, names=tuple(arrays))


# What zipfile and numpy raise for archives that are cut off, damaged, encrypted or packed by an unknown method.
UNREADABLE = (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError)


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


def _read_header(stream: IO[bytes], name: str) -> _Member:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects")
    return _Member(name, tuple(shape), bool(fortran), dtype)


def _from_npz(path: Path) -> Dataset:
    members: dict[str, _Member] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    name = info.filename.removesuffix(".npy")
                    with archive.open(info) as stream:
                        members[name] = _read_header(stream, name)
    except UNREADABLE as exc:
        raise DataError(
            f"cannot read {path} ({first_line(exc)})", expected="a .npz file written by numpy.savez"
        ) from exc
    length = _common_length(str(path), members)
    return Dataset(
        str(path), lambda size: _npz_batches(path, members, length, size), length=length, names=tuple(members)
    )


def _npz_batches(path: Path, members: Mapping[str, _Member], length: int, size: int) -> Iterator[dict[str, Array]]:
    """Stream rows out of the archive, so that a file larger than memory is no trouble."""
    try:
        with zipfile.ZipFile(path) as archive:
            streams = {name: archive.open(f"{name}.npy") for name in members}
            whole: dict[str, Array] = {}
            for name, stream in streams.items():
                _read_header(stream, name)
                if members[name].fortran:
                    with archive.open(f"{name}.npy") as again:
                        whole[name] = np.lib.format.read_array(again, allow_pickle=False)
            for start in range(0, length, size):
                count = min(size, length - start)
                yield {
                    name: whole[name][start : start + count] if name in whole else _rows(stream, members[name], count)
                    for name, stream in streams.items()
                }
    except UNREADABLE as exc:
        raise DataError(f"cannot read {path} ({first_line(exc)})", hint="write it again with numpy.savez") from exc


def _rows(stream: IO[bytes], member: _Member, count: int) -> Array:
    shape = (count, *member.shape[1:])
    wanted = math.prod(shape) * member.dtype.itemsize
    data = stream.read(wanted)
    if len(data) != wanted:
        raise EOFError(f"{member.name} is cut off")
    return np.frombuffer(data, member.dtype).reshape(shape)


def _from_function(text: str) -> Dataset:
    try:
        function = load_object(text)
    except SourceError as exc:
        raise DataError(str(exc)) from exc
    if not callable(function):
        raise DataError(f"{text} is no function", expected="a function that returns or yields dictionaries of arrays")

    def batches(size: int) -> Iterator[dict[str, Array]]:
        try:
            made = function()
            groups = [made] if isinstance(made, Mapping) else made
            if not isinstance(groups, Iterable):
                raise DataError(f"{text} returned {type(made).__name__}", expected="a dictionary of arrays, or several")
            yield from _regroup(text, groups, size)
        except DeploykitError:
            raise
        except Exception as exc:
            raise DataError(f"{text} failed ({first_line(exc)}{user_frame(exc)})", hint="mend the function") from exc

    return Dataset(text, batches)


def _regroup(source: str, groups: Iterable[Any], size: int) -> Iterator[dict[str, Array]]:
    """Cut what a function yields into pieces of at most ``size``; pieces never cross what was yielded as one."""
    for group in groups:
        if not isinstance(group, Mapping):
            raise DataError(f"{source} yielded {type(group).__name__}", expected="dictionaries of arrays")
        arrays = {str(k): np.asarray(v) for k, v in group.items()}
        yield from _slices(arrays, _common_length(source, arrays), size)


def load_object(text: str) -> Any:
    """Import `package.module:name` or `path/file.py:name`; runs the user's code, because the user named it.

    Raises:
        SourceError: Not of that form, not found, or it raised.
    """
    where, sep, name = text.rpartition(":")
    if not sep or not where or not name.isidentifier():
        raise SourceError(f"{text!r} names no function", expected="path/file.py:function or package.module:function")
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    if not hasattr(module, name):
        known = ", ".join(sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))[:8])
        raise SourceError(f"{where} has no {name!r}", expected=f"one of: {known}" if known else "a function there")
    return getattr(module, name)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SourceError(f"{path} does not exist", expected="path/file.py:function")
    folder = str(path.parent.resolve())
    name = f"_deploykit_user_{path.stem}_{abs(hash(str(path.resolve()))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} is no Python file", expected="path/file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as exc:
        del sys.modules[name]
        raise SourceError(
            f"{path} failed on import ({first_line(exc)}{user_frame(exc)})", hint="mend the file"
        ) from exc
    return module


def _load_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name and (name == exc.name or name.startswith(exc.name + ".")):
            raise SourceError(
                f"module {name} cannot be found",
                expected="package.module:function on the Python path, or file.py:function",
            ) from exc
        raise SourceError(f"{name} failed on import ({first_line(exc)}{user_frame(exc)})") from exc
    except Exception as exc:
        raise SourceError(
            f"{name} failed on import ({first_line(exc)}{user_frame(exc)})", hint="mend the module"
        ) from exc


def user_frame(exc: BaseException) -> str:
    """`` at file.py:12`` for the innermost frame that is not in a library; empty where there is none."""
    found = ""
    frame = exc.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if (
            not file.startswith("<")
            and "site-packages" not in file
            and not file.startswith(_STANDARD_LIBRARY)
            and Path(file).parts[-2:-1] != ("deploykit",)
        ):
            found = f" at {Path(file).name}:{frame.tb_lineno}"
        frame = frame.tb_next
    return found


def generate(
    specs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    *,
    ranges: Mapping[str, ValueRange] | None = None,
    seed: int = 0,
) -> dict[str, Array]:
    """Make up inputs that a model can take: shapes from ``sizes``, integers inside ``ranges``.

    Made-up inputs prove shapes and equality of two graphs; they prove no accuracy.

    Args:
        specs: The inputs.
        sizes: A size for every symbol.
        ranges: Values an input may take; without one, reals are N(0, 1) or pictures, integers 0 or 1. Masks without
            one, told by their name, are ones and then zeros along the last axis, as padding is; every row has a one.
        seed: For numpy's default generator.

    Raises:
        DataError: A symbol has no size, or a dtype cannot be made up.
    """
    rng = np.random.default_rng(seed)
    found = ranges or {}
    return {spec.name: _draw(spec, spec.concrete(sizes), found.get(spec.name), rng) for spec in specs}


def _draw(spec: TensorSpec, shape: tuple[int, ...], limits: ValueRange | None, rng: np.random.Generator) -> Array:
    if spec.dtype == "string":
        raise DataError(f"cannot make up strings for {spec.name!r}", hint="give real inputs with --data")
    if limits is None and shape and "mask" in spec.name.lower() and spec.dtype != "bfloat16":
        lengths = rng.integers(1, max(shape[-1], 1) + 1, (*shape[:-1], 1))
        return np.asarray(np.arange(shape[-1]) < lengths).astype(np.dtype(spec.dtype))
    if spec.dtype == "bfloat16":
        import ml_dtypes

        return np.asarray(rng.standard_normal(shape)).astype(ml_dtypes.bfloat16)
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        low, high = (int(limits.low), int(limits.high)) if limits else (0, 1)
        if spec.dtype == "uint8" and (low, high) == (0, 255) and is_picture(shape):
            return np.asarray(np.clip(np.rint(make_pictures(shape, rng) * 48 + 128), 0, 255), np.uint8)
        return rng.integers(low, high + 1, shape).astype(dtype)
    if limits is None and is_picture(shape):
        return make_pictures(shape, rng).astype(dtype)
    middle, spread = ((limits.low + limits.high) / 2, (limits.high - limits.low) / 2) if limits else (0.0, 1.0)
    return np.asarray(rng.standard_normal(shape) * (spread or 1.0) + middle).astype(dtype)


def batch_size_of(signature: Signature, feeds: Mapping[str, Array]) -> int:
    """Size of the first dynamic first axis, or of the first axis; 1 where there is none."""
    first: list[tuple[Dim, int]] = [
        (spec.shape[0], int(feeds[spec.name].shape[0]))
        for spec in signature.inputs
        if spec.shape and spec.name in feeds and feeds[spec.name].ndim
    ]
    dynamic = [size for dim, size in first if isinstance(dim, str)]
    return (dynamic or [size for _, size in first] or [1])[0]
