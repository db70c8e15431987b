"""`deploykit doctor`."""

from __future__ import annotations

import click

from deploykit.cli import common


@click.command()
@common.json_option
def command(as_json: bool) -> None:
    """Show what is installed, which devices exist, what clashes, and what to do; exit 1 where something is wrong."""
    from deploykit.runtimes.probe import diagnose

    found = diagnose()
    if as_json:
        common.show_json(found.as_dict())
    else:
        machine = found.machine
        quota = "" if machine.cores_quota is None else f", cgroup quota {machine.cores_quota:g}"
        memory = f", {machine.memory_bytes / 2**30:.1f} GiB" if machine.memory_bytes else ""
        click.echo(f"cpu      {machine.cpu} ({machine.architecture}){memory}")
        click.echo(
            f"cores    {machine.cores_allowed} allowed "
            f"(machine {machine.cores_machine}, affinity {machine.cores_affinity}{quota})"
        )
        flags = " ".join(
            f"{name}:{'yes' if there else 'no'}" for name, there in machine.flags.items() if "neon" not in name
        )
        click.echo(f"flags    {flags}")
        for name, version in found.packages.items():
            click.echo(f"package  {name} {version or 'missing; run: ' + found.missing[name]}")
        for device in found.devices:
            click.echo(f"device   {device.device}: {'usable' if device.usable else 'not usable'} ({device.detail})")
        for status in found.plugins:
            plugin, word = status.plugin, "broken" if status.problem else "usable"
            click.echo(f"plugin   {plugin.kind} {plugin.name}: {word} ({plugin.distribution} {plugin.version})")
        for text in found.advice:
            click.echo(f"advice   {text}")
        for text in found.problems:
            click.echo(f"problem  {text}")
    if found.problems:
        raise click.exceptions.Exit(1)
