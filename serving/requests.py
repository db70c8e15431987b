"""What is asked of a served model, what it answers, and what the protocols need of the engine between them.

RequestError                what a client is told
├── InvalidRequest      400 a tensor, a name or a parameter does not fit the model
│   ├── Disconnected    400 the client went away before it had sent everything
│   └── Slow            408 the client took longer than a body may take
├── Refused             403 the server was not started with what is asked for
├── UnknownModel        404 no such model, or no such version of it
├── TooLarge            413 over a limit of the server
├── Busy                429 as many requests wait as may wait
├── Failed              500 the runtime failed on this request
├── NotReady            503 the model or the server is starting or stopping
├── WorkerLost          503 the process that computed it died
└── DeadlineExceeded    504 its time ran out
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from deploykit.errors import DeploykitError
from deploykit.specs import Array, TensorSpec

Parameter = bool | int | float | str


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One request.

    Attributes:
        model: Its name.
        inputs: Arrays by name, of the model's dtypes; they need not be contiguous.
        version: Which version; None for the newest.
        id: What the client calls the request.
        outputs: Names of the outputs that are wanted; None for all.
        deadline: When the answer is of no use any more, by `time.monotonic`; None for never.
        parameters: What the client said beside the tensors.
    """

    model: str
    inputs: Mapping[str, Array]
    version: str | None = None
    id: str = ""
    outputs: tuple[str, ...] | None = None
    deadline: float | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferResult:
    """The answer to one request.

    Attributes:
        model: Name of the model.
        version: The version that answered.
        outputs: Arrays by name, in the model's order.
        id: What the client called the request.
        queue_s: Seconds that it waited.
        compute_s: Seconds that the model ran, for the whole batch.
        batch: Rows of the batch that it was part of; 0 where the model is not batched.
    """

    model: str
    version: str
    outputs: Mapping[str, Array]
    id: str
    queue_s: float
    compute_s: float
    batch: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a client may know of a model.

    Attributes:
        name: Name of the model.
        versions: Versions that answer, oldest first.
        platform: "onnxruntime_onnx", "openvino", or the name of the runtime.
        inputs: With their symbols for dynamic dimensions.
        outputs: Likewise.
        max_batch: Most rows that are run at once; 0 where requests are not joined.
        batching: Why requests are not joined though that was asked for; empty where there is nothing to say.
    """

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    batching: str = ""


class RequestError(DeploykitError):
    """A request that is not answered with tensors.

    Attributes:
        http_status: Status code in HTTP.
        grpc_code: Name of the status code in gRPC.
        outcome: What the metrics count it as.
    """

    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    outcome: ClassVar[str] = "failed"


class InvalidRequest(RequestError):
    """A tensor, a name or a parameter does not fit the model."""

    http_status = 400
    grpc_code = "INVALID_ARGUMENT"
    outcome = "invalid"


class Disconnected(InvalidRequest):
    """The client went away before it had sent everything."""


class Slow(InvalidRequest):
    """The client took longer than a body may take."""

    http_status = 408


class Refused(RequestError):
    """The server was not started with what is asked for, or the client may not ask for it."""

    http_status = 403
    grpc_code = "PERMISSION_DENIED"
    outcome = "refused"


class UnknownModel(RequestError):
    """There is no such model, or no such version of it."""

    http_status = 404
    grpc_code = "NOT_FOUND"
    outcome = "unknown"


class TooLarge(RequestError):
    """The request is over a limit of the server."""

    http_status = 413
    grpc_code = "RESOURCE_EXHAUSTED"
    outcome = "too_large"


class Busy(RequestError):
    """As many requests wait for the model as may wait."""

    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"
    outcome = "busy"


class Failed(RequestError):
    """The runtime failed on this request."""


class NotReady(RequestError):
    """The model or the server is starting or stopping."""

    http_status = 503
    grpc_code = "UNAVAILABLE"
    outcome = "not_ready"


class WorkerLost(RequestError):
    """The process that computed the request died."""

    http_status = 503
    grpc_code = "UNAVAILABLE"
    outcome = "worker_lost"


class DeadlineExceeded(RequestError):
    """The time of the request ran out."""

    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"
    outcome = "deadline"


class Engine(Protocol):
    """What the HTTP and gRPC sides need. Everything is called on one event loop."""

    def live(self) -> bool:
        """Whether the process works."""

    def ready(self) -> bool:
        """Whether every model answers and the server is not stopping."""

    def names(self) -> tuple[str, ...]:
        """Names of the models."""

    def info(self, name: str, version: str | None = None) -> ModelInfo:
        """What a client may know of a model.

        Raises:
            UnknownModel: There is none.
            NotReady: It is not loaded.
        """

    def model_ready(self, name: str, version: str | None = None) -> bool:
        """Whether a model answers.

        Raises:
            UnknownModel: There is none.
        """

    async def infer(self, request: InferRequest) -> InferResult:
        """Answer a request by its deadline. Cancelled, a request that still waits never runs.

        Raises:
            DeadlineExceeded: Its time is over, perhaps before it came.
            RequestError: It is not answered; the class says why.
        """

    async def load(self, name: str) -> None:
        """Load a model, or its newest version; the old one answers until the new one does.

        Raises:
            UnknownModel: There is none.
            RequestError: It cannot be loaded.
        """

    async def unload(self, name: str) -> None:
        """Answer no more requests to a model, once the accepted ones are answered.

        Raises:
            UnknownModel: There is none.
        """

    def index(self) -> list[dict[str, str]]:
        """Every model and version: `name`, `version`, `state` and `reason`."""
