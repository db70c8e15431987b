"""`deploykit data`: `pack`, `select` and `show`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from deploykit.cli import common

if TYPE_CHECKING:
    from deploykit.listing import DataSummary

_source = click.argument("source", metavar="DATA")


class _Reals(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2
    """Numbers between commas."""

    name = "NUMBER,…"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Read them; anything else is wrong usage."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no number, nor several between commas", param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Pack datasets into compressed stores, choose small parts of them, show what is in them.

    DATA is FILE.npz, DIR.zarr, a directory of .npy, or module:function.
    """


@command.command("pack")
@_source
@click.option("-o", "--output", required=True, metavar="DIR.zarr", help="Where the store will stand; must not exist.")
@click.option(
    "--mean", type=_Reals(), metavar=_Reals.name,
    help="Of images of uint8, one or one a channel, after --rescale: kept beside the bytes, for models that take "
    "normalized reals. Models with the normalization in their graph are given the bytes.",
)  # fmt: skip
@click.option("--std", type=_Reals(), metavar=_Reals.name, help="Their deviations, as --mean.")
@click.option(
    "--rescale", type=click.FloatRange(0, min_open=True), help="Factor of the bytes before --mean; 1/255 by default."
)
@click.option("--channel-axis", type=int, help="Of the images; -1 where channels come last; 1 by default.")
@click.option(
    "--normalize", "names", multiple=True, metavar="NAME",
    help="Which arrays; all of uint8 but the labels by default. Repeatable.",
)  # fmt: skip
@click.option("--float16", is_flag=True, help="Round reals to 16 bits; says by how much they are off.")
@click.option("--chunk", metavar="SIZE", default="1MiB", show_default=True, help="Of rows that are compressed as one.")
@click.option("--level", type=click.IntRange(1, 9), default=5, show_default=True, help="Of compression.")
@common.json_option
def pack(
    source: str,
    output: str,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    rescale: float | None,
    channel_axis: int | None,
    names: tuple[str, ...],
    float16: bool,
    chunk: str,
    level: int,
    as_json: bool,
) -> None:
    """Write a dataset as a Zarr store: chunked, compressed, with checksums, read by rows."""
    chunk_bytes = common.size_bytes(chunk)
    if chunk_bytes < 1:
        raise click.BadParameter("a chunk holds 1 byte at least.", param_hint="--chunk")
    normalized = bool(mean or std or names or rescale is not None)
    if channel_axis is not None and not normalized:
        raise click.UsageError("--channel-axis goes with --mean, --std, --rescale or --normalize.")
    from deploykit.packing import Normalization, pack_data
    from deploykit.zarr_writer import Layout

    normalization = None
    if normalized:
        normalization = Normalization(
            mean or (), std or (), 1 / 255 if rescale is None else rescale,
            1 if channel_axis is None else channel_axis, names,
        )  # fmt: skip
    layout = Layout(chunk_bytes=chunk_bytes, level=level)
    summary = pack_data(
        source, output, normalization=normalization, float16=float16, layout=layout, progress=common.progress()
    )
    _show(summary, as_json=as_json)


@command.command("select")
@_source
@click.option("-o", "--output", required=True, metavar="FILE", help="Ends in .npz or .zarr; must not exist.")
@click.option("-n", "--count", type=click.IntRange(1), help="How many samples.")
@click.option("--fraction", type=click.FloatRange(0, 1, min_open=True), help="Which share of all instead.")
@click.option("-m", "--model", metavar="MODEL", help="Choose by what this model makes of the samples.")
@click.option("--tensor", metavar="NAME", help="Of the model; what goes into its last product with weights by default.")
@click.option(
    "--method", type=click.Choice(["k-center", "herding", "random"]), default="k-center", show_default=True,
    help="k-center: no sample is far from a chosen one. herding: the chosen ones have the mean of all.",
)  # fmt: skip
@click.option("--stratify/--no-stratify", default=True, show_default=True, help="Give each class of labels its share.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what is random.")
@click.option(
    "--batch", "batch_size", type=click.IntRange(1), default=32, show_default=True, help="Samples in one run."
)
@click.option("--device", metavar="DEVICE", help="Where the model runs; the CPU of ONNX Runtime by default.")
@common.json_option
def select(source: str, output: str, as_json: bool, **options: Any) -> None:
    """Choose a small part that stands for all, for calibration; labels are kept, and numbers of samples noted."""
    if (options["count"] is None) == (options["fraction"] is None):
        raise click.UsageError("Give either -n NUMBER or --fraction SHARE.")
    from deploykit.selecting import select_data

    made = select_data(source, output, progress=common.progress(), **options)
    if as_json:
        common.show_json(made.as_dict())
        return
    strata = "" if made.classes is None else f", {made.classes} classes each by its share"
    click.echo(f"{made.output}: {len(made.indices)} of {made.samples} samples of {made.source}")
    click.echo(f"  {made.method} on {made.features}{strata}, seed {made.seed}")
    click.echo(f"  furthest sample from a chosen one {made.spread.radius:.4g}, at random {made.random.radius:.4g}")
    click.echo(f"  mean off by {made.spread.mean_error:.4g}, at random {made.random.mean_error:.4g}")


@command.command("show")
@_source
@click.option("--verify/--no-verify", default=True, show_default=True, help="Read all of it, and check what can be.")
@common.json_option
def show(source: str, verify: bool, as_json: bool) -> None:
    """What is in a dataset: arrays, sizes, compression, and whether all of it can be read."""
    from deploykit.listing import show_data

    _show(show_data(source, verify=verify, progress=common.progress()), as_json=as_json)


def _show(summary: DataSummary, *, as_json: bool) -> None:
    if as_json:
        common.show_json(summary.as_dict())
        return
    size = "" if summary.disk_bytes is None else f", {_mb(summary.disk_bytes)} on disk"
    ratio = f" ({summary.nbytes / summary.disk_bytes:.1f}x)" if summary.nbytes and summary.disk_bytes else ""
    count = "?" if summary.length is None else str(summary.length)
    click.echo(f"{summary.source}: {summary.form}, {count} samples, {_mb(summary.nbytes)}{size}{ratio}")
    rows = []
    for array in summary.arrays:
        shape = "x".join("?" if size < 0 else str(size) for size in array.shape)
        kind = array.dtype if array.stored == array.dtype else f"{array.stored} {array.scaling}"
        rows.append(
            [array.name, shape, kind, _mb(array.nbytes), _mb(array.disk_bytes), array.compression,
             "" if array.chunk is None else "x".join(map(str, array.chunk)), _error(array.error)]
        )  # fmt: skip
    common.show_table(["array", "shape", "type", "given", "on disk", "compression", "chunk", "off by"], rows)
    if summary.verified:
        click.echo(f"verified: {summary.verified}")
    if summary.digest:
        click.echo(f"sha256 {summary.digest}")
    if summary.selection:
        chosen = summary.selection
        click.echo(
            f"selected: {len(chosen.get('indices', ()))} of {chosen.get('samples')} samples of {chosen.get('source')}, "
            f"{chosen.get('method')} on {chosen.get('features')}, seed {chosen.get('seed')}"
        )
        for noun, key in (("source", "sha256"), ("model", "model_sha256")):
            if chosen.get(key):
                click.echo(f"  {noun}: sha256 {chosen[key]}")


def _mb(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.3g} MB"


def _error(error: Any) -> str:
    return "" if error is None else f"{error.get('max_abs', 0):.2g} at most"
