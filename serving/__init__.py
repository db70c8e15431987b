"""Serving: from an artifact into an image. So far: the smoke test that every bundle will replay."""

from __future__ import annotations

from deploykit.serving.replay import replay_golden

__all__ = ["replay_golden"]
