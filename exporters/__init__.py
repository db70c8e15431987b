"""Exporters: whatever the user has becomes an ONNX file with reference outputs. One verb: `export`.

`open_source` finds out what the source is, loads it and runs it for the reference outputs; `export` writes ONNX by
one of the ways that the source knows. Whether the result is right is decided by the pipeline, which can run it.
"""

from __future__ import annotations

from deploykit.exporters.base import Case, ExportOptions, OnnxRunner, Source, Way
from deploykit.exporters.sources import KINDS, export, open_parts, open_source

__all__ = ["KINDS", "Case", "ExportOptions", "OnnxRunner", "Source", "Way", "export", "open_parts", "open_source"]
