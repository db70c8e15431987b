"""`deploykit package`."""

from __future__ import annotations

from pathlib import Path

import click

from deploykit.cli import common


@click.command()
@click.argument("artifact")
@click.option(
    "--target", required=True, type=click.Choice(["triton", "ovms", "kserve", "bentoml", "mlflow", "docker"]),
    help="What the files are for.",
)  # fmt: skip
@click.option("-o", "--output", required=True, metavar="DIR", help="Where the bundle will stand; must not exist.")
@click.option("--name", metavar="NAME", help="The model's name on the server; by default its directory's.")
@click.option(
    "--settings", metavar="FILE",
    help="Tuned settings (`benchmark --tune --save-settings`); by default those that the artifact brings.",
)  # fmt: skip
@click.option("--device", metavar="DEVICE", help="Where it is to run; by default the settings', else the CPU.")
@click.option(
    "--max-batch", type=click.IntRange(0, 65536), metavar="N",
    help="Most rows of requests that the server joins; 0 for none. By default what the model allows, which is tried.",
)  # fmt: skip
@click.option(
    "--max-delay-ms", type=click.FloatRange(0, 10_000), metavar="MS",
    help="How long a request waits for others (triton, kserve, docker).",
)  # fmt: skip
@click.option(
    "--min-cosine", type=click.FloatRange(-1, 1),
    help="Accept other values down to this cosine; for quantized models 0.95 by default.",
)  # fmt: skip
@click.option("--lock", metavar="FILE", help="Requirements with hashes, in place of asking the package index (docker).")
@click.option("--base-image", metavar="IMAGE@sha256:…", help="What the image starts from, with its digest (docker).")
@click.option("--image", metavar="NAME[:TAG]", help="Name of the image (docker).")
@click.option("--storage-uri", metavar="URI", help="Where KServe finds the model (kserve).")
@common.json_option
def command(
    artifact: str,
    target: str,
    output: str,
    name: str | None,
    settings: str | None,
    device: str | None,
    max_batch: int | None,
    max_delay_ms: float | None,
    min_cosine: float | None,
    lock: str | None,
    base_image: str | None,
    image: str | None,
    storage_uri: str | None,
    as_json: bool,
) -> None:
    """Write what a serving target takes: model, configuration with the tuned settings, warm-up, golden requests."""
    import json

    from deploykit.packaging import package
    from deploykit.serving.package_plan import TargetOptions

    options = TargetOptions(max_delay_ms, Path(lock) if lock else None, base_image, image, storage_uri)
    bundle = package(
        artifact, output, target=target, name=name, settings=settings, device=device, max_batch=max_batch,
        min_cosine=min_cosine, options=options, progress=common.progress(),
    )  # fmt: skip
    manifest = bundle.manifest
    if as_json:
        common.show_json({"bundle": str(bundle.path), "manifest": json.loads(manifest.model_dump_json())})
        return
    size = sum(entry.bytes for entry in manifest.files.values())
    click.echo(f"{bundle.path}: {manifest.name} for {target}, {len(manifest.files)} files, {size / 1e6:.2f} MB")
    click.echo(f"  joined  {f'up to {manifest.max_batch} rows' if manifest.max_batch > 1 else 'no'}")
    click.echo(f"  golden  {common.parity_line(dict(manifest.replay))}")
    click.echo(f"  start   see {bundle.path / 'README.md'}")
