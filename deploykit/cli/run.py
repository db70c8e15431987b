"""`deploykit run`."""

from __future__ import annotations

import click

from deploykit.cli import common


@click.command()
@click.argument("recipe")
@click.option("-o", "--output", metavar="DIR", help="Receives one artifact a step, and the reports.")
@click.option("--resume", is_flag=True, help="Go on in a directory that an interrupted run left.")
@common.json_option
@click.option("--dry-run", is_flag=True, help="Print the recipe with all its defaults, and stop.")
def command(recipe: str, output: str | None, resume: bool, as_json: bool, dry_run: bool) -> None:
    """Run a recipe (TOML, one table a step): the whole chain from source to report."""
    from deploykit.recipe import Recipe, dump

    loaded = Recipe.load(recipe)
    if dry_run:
        click.echo(dump(loaded.tables()), nl=False)
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    from deploykit.benchmarks import Report
    from deploykit.cli.benchmark import show_report
    from deploykit.pipeline import run

    results = run(loaded, output, resume=resume, progress=common.progress())
    if as_json:
        plain = {k: v.data if isinstance(v, Report) else str(v.path) for k, v in results.items()}
        common.show_json({"output": output, "steps": plain})
        return
    for name, made in results.items():
        if isinstance(made, Report):
            show_report(made)
        else:
            click.echo(f"{name}: {made.path}, {made.size_bytes / 1e6:.2f} MB")
