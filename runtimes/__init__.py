"""Runtimes: a model becomes a `Session` on a named device. One verb: `open_session`."""

from __future__ import annotations

from deploykit.runtimes.base import Device, NodePlacement, Placement, Session, parse_device
from deploykit.runtimes.requests import Bound, Request
from deploykit.runtimes.sessions import default_devices, load, open_session, require_device
from deploykit.runtimes.settings import RuntimeSettings

__all__ = [
    "Bound",
    "Device",
    "NodePlacement",
    "Placement",
    "Request",
    "RuntimeSettings",
    "Session",
    "default_devices",
    "load",
    "open_session",
    "parse_device",
    "require_device",
]
