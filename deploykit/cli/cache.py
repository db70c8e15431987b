"""`deploykit cache`: what searches have kept."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from deploykit.cli import common

if TYPE_CHECKING:
    from deploykit.search.cache import Entry

_UNITS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@common.json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Results of earlier searches, which are not made twice. Without a command: list them.

    They lie in $DEPLOYKIT_CACHE, else in $XDG_CACHE_HOME/deploykit, else in ~/.cache/deploykit.
    """
    if context.invoked_subcommand is None:
        _list(as_json)
    elif as_json:
        raise click.UsageError(f"--json goes behind the command: deploykit cache {context.invoked_subcommand} --json")


@command.command("list")
@common.json_option
def list_(as_json: bool) -> None:
    """List what is kept, last used first."""
    _list(as_json)


@command.command()
@click.option("--max-size", metavar="SIZE", help="Until the rest is not larger: 2GB, 500MB. Least recently used first.")
@click.option("--older-than", metavar="TIME", help="What was not used for so long: 30d, 12h.")
@click.option("--all", "everything", is_flag=True, help="Everything.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and stop.")
@common.json_option
def prune(max_size: str | None, older_than: str | None, everything: bool, dry_run: bool, as_json: bool) -> None:
    """Remove results, but none that a running search uses."""
    if max_size is None and older_than is None and not everything:
        raise click.UsageError("Say what to remove: --max-size SIZE, --older-than TIME, or --all.")
    limit = None if max_size is None else common.size_bytes(max_size)
    age = None if older_than is None else common.seconds(older_than)
    from deploykit.search.cache import Cache

    removed = Cache().prune(limit, age, everything, dry_run=dry_run)
    if as_json:
        common.show_json({"dry_run": dry_run, "removed": [asdict(e) for e in removed]})
        return
    if removed and dry_run:
        _table(removed)
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{_count(removed)} {verb}, {_size(sum(e.bytes for e in removed))}")


@command.command("dir")
def dir_() -> None:
    """Print the directory that the results lie in."""
    from deploykit.search.cache import default_root

    click.echo(str(default_root().absolute()))


def _list(as_json: bool) -> None:
    from deploykit.search.cache import Cache

    cache = Cache()
    found = cache.entries()
    if as_json:
        common.show_json({"dir": str(cache.root), "entries": [asdict(e) for e in found]})
        return
    if found:
        _table(found)
    click.echo(f"{_count(found)} in {cache.root}, {_size(sum(e.bytes for e in found))}")


def _table(entries: list[Entry]) -> None:
    now = time.time()
    rows = [
        [e.label or e.deed.rpartition(":")[2], _size(e.bytes), _ago(now - e.created), _ago(now - e.used)]
        for e in entries
    ]
    common.show_table(["what", "size", "age", "last used"], rows)


def _count(entries: list[Entry]) -> str:
    return f"{len(entries)} result{'' if len(entries) == 1 else 's'}"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _ago(seconds: float) -> str:
    unit, size = next((u for u in _UNITS if seconds >= u[1]), _UNITS[-1])
    return f"{max(0.0, seconds) / size:.0f} {unit} ago"
