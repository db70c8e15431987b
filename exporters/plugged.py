"""Sources of kinds that other distributions know; see `docs/extending.md`."""

from __future__ import annotations

from typing import Protocol

from deploykit.errors import PluginError
from deploykit.exporters.base import ExportOptions, Source
from deploykit.plugins import Plugin, installed

_NEEDED = ("kind", "label", "signature", "ranges", "cases", "data")


class Exporter(Protocol):
    """What an entry point of `deploykit.exporters` is."""

    def opens(self, source: str) -> bool:
        """Whether this is a source of its kind: judged by the name and, at most, the first bytes.

        It is asked only where the source is of none of our own kinds.
        """

    def open(self, source: str, options: ExportOptions) -> Source:
        """Load the source and run it for its reference cases.

        Raises:
            SourceError: It cannot be read.
            OptionError: Options that do not apply to it.
        """


def open_plugged(source: str, options: ExportOptions) -> Source | None:
    """The source as a plugin loads it; None where none knows its kind.

    Raises:
        PluginError: A plugin does not load, fails, or gives no source; or several claim it.
        SourceError: The one that knows it cannot read it.
    """
    claims: list[tuple[Plugin, Exporter]] = []
    broken: list[PluginError] = []
    for plugin in installed("exporters"):
        try:
            exporter: Exporter = plugin.load()
            with plugin.blamed(f"looked at {source}"):
                if exporter.opens(source):
                    claims.append((plugin, exporter))
        except PluginError as exc:
            broken.append(exc)
    if not claims:
        if broken:  # it may have been the one
            raise broken[0]
        return None
    if len(claims) > 1:
        raise PluginError(
            f"{source} is claimed by the {' and the '.join(str(plugin) for plugin, _ in claims)}",
            hint=f"remove one: pip uninstall {claims[0][0].distribution}",
        )
    plugin, exporter = claims[0]
    with plugin.blamed(f"opened {source}"):
        found = exporter.open(source, options)
    if not isinstance(found, Source):
        raise PluginError(
            f"the {plugin} opened {source} as {type(found).__name__}", expected="an exporters.base.Source"
        )
    missing = [name for name in _NEEDED if not hasattr(found, name)]
    if missing or not found.cases:
        what = f"has no {missing[0]!r}" if missing else "has no cases"
        raise PluginError(f"what the {plugin} made of {source} {what}", hint="see docs/extending.md")
    found.plugin = plugin
    return found
