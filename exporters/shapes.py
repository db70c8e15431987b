"""Dynamic dimensions: what the user asks for, which sizes to check, and the names they get."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from deploykit.data import LABELS, Dataset, ValueRange
from deploykit.errors import DeploykitError, ExportError, OptionError, first_line
from deploykit.exporters.base import Case, ExportOptions
from deploykit.specs import DTYPES, Array, Dim, Feeds, Signature, TensorSpec, fit_feeds, terms

_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_NUMBER = r"-?\d+(?:\.\d+)?"
_INPUT = re.compile(
    r"(?P<name>[^=]+)=(?P<dtype>\w+)\[(?P<dims>[^\]]*)\]"
    rf"(?::(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER}))?"
)
_INPUT_FORM = "name=dtype[dim,...] like x=float32[batch,3,224,224] or ids=int64[batch,sequence]:0..30521"
_DYNAMIC_FORM = "batch, none, or name:axis=symbol,axis=symbol like x:0=batch,2=height"


def parse_input(text: str) -> tuple[TensorSpec, ValueRange | None]:
    """Read one `--input`.

    Raises:
        OptionError: Not of the form.
    """
    match = _INPUT.fullmatch(text.strip())
    if match is None or match["dtype"] not in DTYPES:
        raise OptionError(f"cannot read --input {text!r}", expected=_INPUT_FORM)
    dims: list[Dim] = []
    for part in filter(None, (p.strip() for p in match["dims"].split(","))):
        if part.isdecimal() and int(part) > 0:
            dims.append(int(part))
        elif _SYMBOL.fullmatch(part):
            dims.append(part)
        else:
            raise OptionError(f"dimension {part!r} in --input {text!r}", expected="a positive number or a name")
    limits = ValueRange(float(match["low"]), float(match["high"])) if match["low"] is not None else None
    if limits is not None and limits.low > limits.high:
        raise OptionError(f"the range {match['low']}..{match['high']} in --input {text!r}", expected="LOW..HIGH")
    return TensorSpec(match["name"].strip(), match["dtype"], tuple(dims)), limits


def plan_inputs(examples: Mapping[str, Array], options: ExportOptions) -> tuple[TensorSpec, ...]:
    """Inputs with their dynamic dimensions, from example inputs and the user's wishes.

    Raises:
        OptionError: A wish that contradicts the example.
    """
    names = [parse_input(text)[0].name for text in options.inputs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise OptionError(f"--input names {twice[0]!r} twice", expected="one --input for an input")
    asked = {spec.name: spec for spec, _ in map(parse_input, options.inputs)}
    # Names in --input are the user's choice of dynamic dimensions; the default is for those who made none.
    chosen = not options.dynamic and any(spec.symbols for spec in asked.values())
    wishes = {} if chosen else parse_dynamic(options.dynamic, examples)
    specs = []
    for name, array in examples.items():
        shape: list[Dim] = [int(s) for s in array.shape]
        if name in asked:
            _check_against_example(asked[name], array)
            if "none" not in options.dynamic:
                shape = list(asked[name].shape or ())
        for axis, symbol in wishes.get(name, {}).items():
            shape[axis] = symbol
        specs.append(TensorSpec(name, array.dtype.name if array.dtype.kind != "O" else "string", tuple(shape)))
    unknown = [name for name in asked if name not in examples]
    if unknown:
        raise OptionError(f"--input names {unknown[0]!r}", expected=f"one of {', '.join(examples)}")
    return tuple(specs)


def asks_for_dynamic(options: ExportOptions) -> bool:
    """Whether the user named dynamic dimensions, so that fixed ones would not be what they asked for."""
    return bool(options.dynamic) or any(parse_input(text)[0].symbols for text in options.inputs)


def _check_against_example(spec: TensorSpec, example: Array) -> None:
    shape = spec.shape or ()
    fits = len(shape) == example.ndim and all(
        isinstance(dim, str) or dim == size for dim, size in zip(shape, example.shape, strict=True)
    )
    if not fits or spec.dtype != example.dtype.name:
        raise OptionError(
            f"--input {spec} contradicts the example input {example.dtype}{list(example.shape)}",
            hint="drop --input, or change the example that the factory returns",
        )


def read_dynamic(texts: Sequence[str]) -> list[tuple[str, dict[int, str]]]:
    """Every `--dynamic INPUT:AXIS=NAME,...`: the input, and names by axis; before anything is loaded.

    Raises:
        OptionError: Not of the form, or `none` beside others.
    """
    if "none" in texts and len(texts) > 1:
        raise OptionError("--dynamic none together with another --dynamic", hint="give one of them")
    found = []
    for text in texts:
        if text in ("batch", "none"):
            continue
        name, sep, rest = text.rpartition(":")
        axes: dict[int, str] = {}
        for part in rest.split(","):
            axis, _, symbol = part.strip().partition("=")
            if not sep or not (axis.isascii() and axis.isdecimal()) or not _SYMBOL.fullmatch(symbol):
                raise OptionError(f"cannot read --dynamic {text!r}", expected=_DYNAMIC_FORM)
            axes[int(axis)] = symbol
        found.append((name, axes))
    return found


def parse_dynamic(texts: Sequence[str], examples: Mapping[str, Array]) -> dict[str, dict[int, str]]:
    """Read all `--dynamic`: a symbol's name by axis, by input.

    Without any, the first axis of every input is `batch` where all inputs agree on its size.

    Raises:
        OptionError: Not of the form, or it names an input or an axis that is not there.
    """
    wishes: dict[str, dict[int, str]] = {}
    read = read_dynamic(texts)
    if "none" in texts:
        return {}
    if not texts or "batch" in texts:
        wishes = _batch_axes(examples, asked="batch" in texts)
    for name, axes in read:
        if name not in examples:
            raise OptionError(f"--dynamic names {name!r}, which is no input", expected=f"one of {', '.join(examples)}")
        rank = examples[name].ndim
        for axis, symbol in axes.items():
            if axis >= rank:
                raise OptionError(
                    f"--dynamic names axis {axis} of {name!r}",
                    expected=f"an axis below {rank}, the rank of the example",
                )
            wishes.setdefault(name, {})[axis] = symbol
    return wishes


def _batch_axes(examples: Mapping[str, Array], *, asked: bool) -> dict[str, dict[int, str]]:
    sizes = {name: a.shape[0] for name, a in examples.items() if a.ndim}
    if len(set(sizes.values())) > 1:
        if asked:
            raise OptionError(
                f"the inputs' first axes differ: {sizes}", hint="name the axes: --dynamic input:axis=batch"
            )
        return {}
    return {name: {0: "batch"} for name in sizes}


def example_sizes(specs: Sequence[TensorSpec], examples: Feeds) -> dict[str, int]:
    """Size of every symbol in the example inputs.

    Raises:
        ExportError: One symbol has two sizes.
    """
    sizes: dict[str, int] = {}
    sums: list[tuple[Dim, int]] = []
    for spec in specs:
        # Of an unknown rank there is nothing to name.
        for dim, size in zip(spec.shape or (), examples[spec.name].shape, strict=spec.shape is not None):
            if len(terms(dim)) > 1:
                sums.append((dim, size))
            elif isinstance(dim, str) and sizes.setdefault(dim, int(size)) != size:
                raise ExportError(
                    f"dimension {dim!r} is {sizes[dim]} and {size} in the example inputs",
                    hint="give the two axes different names with --dynamic",
                )
    for dim, size in sums:
        _settle_sum(dim, size, sizes)
    return sizes


def _settle_sum(dim: Dim, size: int, sizes: dict[str, int]) -> None:
    """Check a sum of symbols; where one of them is unknown so far, its size follows."""
    unknown = [t for t in terms(dim) if isinstance(t, str) and t not in sizes]
    rest = size - sum(sizes[t] if isinstance(t, str) else t for t in terms(dim) if t not in unknown)
    if len(unknown) == 1 and rest >= 0:
        sizes[unknown[0]] = rest
    elif unknown or rest:
        raise ExportError(
            f"dimension {dim!r} is {size} in the example inputs, where {sizes}",
            hint="give the axis a name of its own with --dynamic",
        )


def sizes_to_check(
    sizes: Mapping[str, int],
    limits: Mapping[str, tuple[int, int]] | None = None,
    batch: Collection[str] = ("batch",),
) -> list[dict[str, int]]:
    """At least four sets of sizes: batch 1 and others, larger, smaller and odd.

    Symbols that are equal in the example (height and width) differ in some set, so that mixing them up shows.

    Args:
        sizes: Size of every symbol in the example.
        limits: Smallest and largest size that the source allows, by symbol.
        batch: Symbols that count samples.
    """
    bounds = limits or {}
    place = {symbol: i for i, symbol in enumerate(s for s in sizes if s not in batch)}

    def pick(symbol: str, size: int) -> int:
        low, high = bounds.get(symbol, (1, 1 << 30))
        return min(max(size, low), high)

    # Multiples come first: many modules (strides, patches) accept nothing else.
    plans: list[Callable[[str, int], int]] = [
        lambda s, n: n,
        lambda s, n: 1 if s in batch else n,
        lambda s, n: 3 if s in batch else n * (2, 1, 3)[place[s] % 3],
        lambda s, n: 2 if s in batch else n // 2 + 1,
        lambda s, n: 5 if s in batch else n + 3 + place[s],
    ]
    found: list[dict[str, int]] = []
    for plan in plans:
        wanted = {s: pick(s, plan(s, n)) for s, n in sizes.items()}
        if wanted not in found:
            found.append(wanted)
    return found


def one_by_one(known: Mapping[str, int], wanted: Mapping[str, int]) -> list[dict[str, int]]:
    """The known sizes with one of the wanted ones, for each that differs."""
    return [{**known, symbol: size} for symbol, size in wanted.items() if size != known[symbol]]


def vary(
    example: Array, shape: tuple[int, ...], rng: np.random.Generator, axes: Collection[int] | None = None
) -> Array:
    """An input like ``example``, of another shape and with other values.

    Reals are the example, tiled, plus noise of half its spread, so that no two rows are equal; integers, booleans
    and strings are drawn from the values that occur in the example, so that they stay legal.

    Args:
        example: An input that the source accepts.
        shape: The shape to make.
        rng: Where chance comes from.
        axes: Draw everything, reals as well, from the example's values, and only from those that stand at other places
            along these axes: an input of reals may hold ids, and one input the ids of two tables side by side.
    """
    if example.size == 0:
        return np.zeros(shape, example.dtype)
    if axes is not None:
        places = [np.arange(n).reshape([-1 if i == a else 1 for i in range(len(shape))]) for a, n in enumerate(shape)]
        return np.asarray(
            example[tuple(rng.integers(0, example.shape[a], shape) if a in axes else at for a, at in enumerate(places))]
        )
    if example.dtype.kind not in "fc":
        return rng.choice(example.ravel(), size=shape).astype(example.dtype)
    tiled = np.tile(example, [-(-want // max(have, 1)) for want, have in zip(shape, example.shape, strict=True)])
    tiled = tiled[tuple(slice(0, want) for want in shape)]
    spread = float(example.std()) or 1.0
    return np.asarray(tiled + rng.standard_normal(shape) * spread / 2).astype(example.dtype)


def _variations(
    specs: Sequence[TensorSpec], examples: Feeds, wanted: Mapping[str, int], rng: np.random.Generator
) -> Iterator[dict[str, Array]]:
    """Inputs for some sizes: new values first, then those of the example, ever nearer to where they were."""
    yield {s.name: vary(examples[s.name], s.concrete(wanted), rng) for s in specs}
    ranks = {s.name: examples[s.name].ndim for s in specs}
    free = {s.name: {axis for axis, dim in enumerate(s.shape or ()) if isinstance(dim, str)} for s in specs}
    for also in (range, lambda rank: {rank - 1}, lambda rank: {0}, lambda rank: ()):
        axes = {name: free[name] | set(also(rank)) for name, rank in ranks.items()}
        found = {s.name: vary(examples[s.name], s.concrete(wanted), rng, axes[s.name]) for s in specs}
        if any(not np.array_equal(found[name], examples[name]) for name in found):
            yield found


def make_cases(
    specs: Sequence[TensorSpec],
    examples: Feeds,
    reference: Callable[[Feeds], dict[str, Array]],
    *,
    limits: Mapping[str, tuple[int, int]] | None = None,
    draw: Callable[[dict[str, int]], dict[str, Array]] | None = None,
    check: Sequence[dict[str, int]] | None = None,
    tie: Callable[[dict[str, int]], dict[str, int]] = dict,
) -> tuple[list[Case], list[str]]:
    """Run the source at several shapes.

    Args:
        specs: Inputs with their dynamic dimensions.
        examples: One set of inputs that the source accepts.
        reference: Runs the source.
        limits: Sizes that the source allows, by symbol.
        draw: Makes inputs for given sizes; by default variations of the example.
        check: Sizes to run at, beside the example's; by default those of `sizes_to_check`.
        tie: Makes sizes fit each other, where one follows from another.

    Returns:
        The cases, the example first, and notes on shapes that the source itself refuses.

    Raises:
        ExportError: With dynamic dimensions, only one shape is accepted.
    """
    sizes = example_sizes(specs, examples)
    rng = np.random.default_rng(0)
    cases = [Case(sizes, dict(examples), reference(examples))]
    notes: list[str] = []
    batch = {str(s.shape[0]) for s in specs if s.shape} | {"batch"}
    wanted_sizes = check if check is not None else sizes_to_check(sizes, limits, batch)[1:]
    plans = [tie(plan) for plan in wanted_sizes] if sizes else [{}, {}, {}]
    for number, wanted in enumerate(plans):
        if sizes and (wanted == sizes or wanted in plans[:number]):
            continue
        first: Exception | None = None
        for feeds in [draw(wanted)] if draw else _variations(specs, examples, wanted, rng):
            try:
                cases.append(Case(wanted, feeds, reference(feeds)))
            except Exception as exc:
                if isinstance(exc, DeploykitError) and not sizes:
                    raise
                first = first or exc
            else:
                break
        else:
            text = ", ".join(f"{k}={v}" for k, v in wanted.items())
            where = f"at {text}" if text else "on other values of the example's shape"
            note = f"the source itself does not run {where} ({first_line(first, 120) if first else ''})"
            notes += [note] if note not in notes else []
    if sizes and len(cases) < 2:
        raise ExportError(
            f"the source runs at one shape only, {sizes}; {notes[0] if notes else ''}",
            hint="export it with --dynamic none, or name only the axes that may change",
        )
    return cases, notes


def cases_from_data(
    specs: Sequence[TensorSpec], dataset: Dataset, reference: Callable[[Feeds], dict[str, Array]]
) -> list[Case]:
    """Cases out of real data: batches of 1, 3 and 5 where the batch is dynamic, else three of the fixed size.

    Raises:
        DataError: The data do not fit the inputs.
    """
    signature = Signature(tuple(specs), ())
    first = [s.shape[0] for s in specs if s.shape]
    fixed = next((d for d in first if isinstance(d, int)), None)
    counts = [1, 3, 5] if fixed is None else [fixed] * 3
    rows = dataset.fitted(specs).head(sum(counts))
    available = len(next(iter(rows.values())))
    cases, start = [], 0
    for count in counts:
        if start + count > available:
            break
        part = {k: v[start : start + count] for k, v in rows.items() if k != LABELS}
        start += count
        feeds = fit_feeds(signature, part)
        cases.append(Case(example_sizes(specs, feeds), feeds, reference(feeds)))
    if not cases:
        raise ExportError(f"{dataset.source} holds {available} samples", expected=f"at least {counts[0]}")
    return cases


def observed_outputs(cases: Sequence[Case]) -> tuple[TensorSpec, ...]:
    """Output specs, with dimension names found by watching the sizes over all cases.

    An axis that always has a symbol's size gets the symbol's name; one that never changes is fixed; any other is
    named after the output; axes that always have one size have one name. A sum of two symbols is seen too. Where the
    rank changes, it is that of the first case.
    """
    specs = []
    named: dict[tuple[int, ...], str] = {}
    for name, first in cases[0].outputs.items():
        one_rank = len({case.outputs[name].ndim for case in cases}) == 1
        dims = [
            _observed_dim(name, axis, cases, named) if one_rank else f"{name}_dim{axis}" for axis in range(first.ndim)
        ]
        specs.append(TensorSpec(name, first.dtype.name if first.dtype.kind not in "OU" else "string", tuple(dims)))
    return tuple(specs)


def _observed_dim(name: str, axis: int, cases: Sequence[Case], named: dict[tuple[int, ...], str]) -> Dim:
    """Size or name of one axis; ``named`` holds the names that were given so far, by the sizes of the axis."""
    sizes = [case.outputs[name].shape[axis] for case in cases]
    if len(set(sizes)) == 1:
        return int(sizes[0])
    for symbol in cases[0].sizes:
        if all(case.sizes[symbol] == size for case, size in zip(cases, sizes, strict=True)):
            return symbol
    for first, second in itertools.combinations(sorted(cases[0].sizes), 2):
        if all(c.sizes[first] + c.sizes[second] == size for c, size in zip(cases, sizes, strict=True)):
            return f"{first} + {second}"
    return named.setdefault(tuple(sizes), f"{name}_dim{axis}")
