"""Runtimes: a model becomes a `Session` on a named device. One verb: `open_session`."""

from __future__ import annotations

from deploykit.runtimes.base import Session, SessionOptions
from deploykit.runtimes.device import Device, parse_device
from deploykit.runtimes.placement import ExecutedNode, NodePlacement, Placement
from deploykit.runtimes.requests import Bound, Request
from deploykit.runtimes.sessions import default_devices, load, open_session, require_device
from deploykit.runtimes.settings import RuntimeSettings

__all__ = [
    "Bound",
    "Device",
    "ExecutedNode",
    "NodePlacement",
    "Placement",
    "Request",
    "RuntimeSettings",
    "Session",
    "SessionOptions",
    "default_devices",
    "load",
    "open_session",
    "parse_device",
    "require_device",
]
