"""What Triton tells of a model beyond the Open Inference Protocol: its configuration, and statistics of its requests.

Both in Triton's form, as `tritonclient` reads it, in JSON and over gRPC:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_configuration.md and
extension_statistics.md.

Statistics are counted here, from answers. Of a batch each request knows how many rows ran with its own, so that a batch
is counted in parts: one whose requests were all answered counts as one, and of one in which a client went away that
client's part is missing. The engine tells queue and computation apart; input and output are not measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from deploykit.serving.requests import Engine, InferRequest, InferResult, ModelInfo, NotReady
from deploykit.serving.v2_types import datatype_of
from deploykit.specs import TensorSpec

_BACKENDS = {"onnxruntime_onnx": "onnxruntime", "pytorch": "pytorch", "openvino": "openvino"}
# Triton's DataType, by the protocol's name and in the order of its numbers.
_TYPES = (
    "INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64",
    "STRING", "BF16",
)  # fmt: skip
# Sizes of batches that are told apart; a model that joins nothing has one.
_MOST_SIZES = 1024


def model_config(info: ModelInfo, *, enums: bool = False) -> dict[str, Any]:
    """A model as Triton's ModelConfig.

    Args:
        info: What a client may know of it.
        enums: Whether types are numbers, as on the wire of gRPC, or names, as in JSON.
    """
    joined = info.max_batch > 0
    config: dict[str, Any] = {
        "name": info.name,
        "platform": info.platform,
        "backend": _BACKENDS.get(info.platform, info.platform),
        "version_policy": {"latest": {"num_versions": len(info.versions)}},
        "max_batch_size": info.max_batch,
        "input": [_tensor(spec, joined, enums) for spec in info.inputs],
        "output": [_tensor(spec, joined, enums) for spec in info.outputs],
    }
    if joined:
        config["dynamic_batching"] = {}
    return config


def _tensor(spec: TensorSpec, joined: bool, enums: bool) -> dict[str, Any]:
    """An input or output; where requests are joined, Triton leaves the first dimension out."""
    datatype = datatype_of(spec.dtype)
    name = "STRING" if datatype == "BYTES" else datatype
    dims = [-1] if spec.shape is None else [dim if isinstance(dim, int) else -1 for dim in spec.shape]
    kind = _TYPES.index(name) if enums else f"TYPE_{name}"
    return {"name": spec.name, "data_type": kind, "dims": dims[1:] if joined else dims}


@dataclass(slots=True)
class _Duration:
    """How often something was, and how long in all."""

    count: float = 0.0
    seconds: float = 0.0

    def add(self, count: float, seconds: float) -> None:
        self.count += count
        self.seconds += seconds

    def as_dict(self) -> dict[str, int]:
        return {"count": round(self.count), "ns": round(self.seconds * 1e9)}


@dataclass(slots=True)
class _Counts:
    """What is counted of one version of a model."""

    last_ms: int = 0
    rows: int = 0
    runs: float = 0.0
    success: _Duration = field(default_factory=_Duration)
    fail: _Duration = field(default_factory=_Duration)
    queue: _Duration = field(default_factory=_Duration)
    compute: _Duration = field(default_factory=_Duration)
    batches: dict[int, _Duration] = field(default_factory=dict)

    def as_dict(self, name: str, version: str) -> dict[str, Any]:
        none = _Duration().as_dict()
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ms,
            "inference_count": self.rows,
            "execution_count": round(self.runs),
            "inference_stats": {
                "success": self.success.as_dict(),
                "fail": self.fail.as_dict(),
                "queue": self.queue.as_dict(),
                "compute_input": none,
                "compute_infer": self.compute.as_dict(),
                "compute_output": none,
                "cache_hit": none,
                "cache_miss": none,
            },
            "batch_stats": [
                {"batch_size": size, "compute_input": none, "compute_infer": spent.as_dict(), "compute_output": none}
                for size, spent in sorted(self.batches.items())
            ],
        }


class Statistics:
    """What Triton's clients ask for of the requests so far. For one event loop, and all ports of a server."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], _Counts] = {}

    def answered(self, request: InferRequest, result: InferResult, seconds: float) -> None:
        """Count a request that was answered."""
        counts = self._of(result.model, result.version)
        rows = _rows(request) if result.batch else 1
        size = result.batch or 1
        part = rows / size
        counts.last_ms = time.time_ns() // 1_000_000
        counts.rows += rows
        counts.runs += part
        counts.success.add(1, seconds)
        counts.queue.add(1, result.queue_s)
        counts.compute.add(1, result.compute_s)
        if size in counts.batches or len(counts.batches) < _MOST_SIZES:
            counts.batches.setdefault(size, _Duration()).add(part, result.compute_s * part)

    def failed(self, model: str, version: str, seconds: float) -> None:
        """Count a request that was not answered, of a version that there is."""
        self._of(model, version).fail.add(1, seconds)

    def shown(self, engine: Engine, name: str | None = None, version: str | None = None) -> list[dict[str, Any]]:
        """As Triton's `model_stats`.

        Args:
            engine: Knows which models and versions there are.
            name: Of the model; None for all that answer.
            version: Which version; None for all of it that answer.

        Raises:
            UnknownModel: There is none.
            NotReady: It is not loaded.
        """
        found = []
        for model in engine.names() if name is None else (name,):
            try:
                versions = engine.info(model, version).versions
            except NotReady:
                if name is not None:
                    raise
                continue
            for each in versions if version is None else (version,):
                found.append(self._counts.get((model, each), _Counts()).as_dict(model, each))
        return found

    def _of(self, model: str, version: str) -> _Counts:
        counts = self._counts.get((model, version))
        if counts is None:
            counts = self._counts[model, version] = _Counts()
        return counts


def _rows(request: InferRequest) -> int:
    array = next(iter(request.inputs.values()), None)
    return array.shape[0] if array is not None and array.ndim else 1
