"""Serving: from an artifact into an image and a server. Each part is loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploykit.serving.replay import replay_golden

__all__ = ["replay_golden"]


def __getattr__(name: str) -> Any:
    if name != "replay_golden":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deploykit.serving.replay import replay_golden

    return replay_golden
