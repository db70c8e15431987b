"""What HTTP and gRPC have in common: who may ask, what is told of the models, how long an answer may take."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import time
from collections.abc import Sequence
from typing import Any

import deploykit
from deploykit.serving.requests import Engine, InferRequest, InferResult, InvalidRequest, Parameter, RequestError
from deploykit.serving.triton_api import Statistics
from deploykit.serving.v2_types import metadata, shown

_ERROR_LENGTH = 1000


class Tokens:
    """Bearer tokens. Their digests are compared, all of them, so that the time taken says nothing about any.

    Args:
        tokens: Any of them is accepted; none: no token is needed.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._digests = tuple(hashlib.sha256(token.encode()).digest() for token in tokens)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, authorization: bytes | None) -> bool:
        """Whether the value of a header `Authorization` holds a token."""
        if not self._digests:
            return True
        scheme, _, token = (authorization or b"").strip().partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found and scheme.lower() == b"bearer"


def server_metadata(*, repository: bool) -> dict[str, Any]:
    """Name, version and extensions of this server."""
    extensions = ["binary_tensor_data", "model_configuration", "parameters", "statistics"]
    extensions += ["model_repository"] if repository else []
    return {"name": "deploykit", "version": deploykit.__version__, "extensions": extensions}


def model_metadata(engine: Engine, name: str, version: str | None) -> dict[str, Any]:
    """What the protocol says of a model, and whether its requests are joined.

    Raises:
        UnknownModel: There is none.
        NotReady: It is not loaded.
    """
    info = engine.info(name, version)
    return {
        "name": info.name,
        "versions": list(info.versions),
        "platform": info.platform,
        "inputs": [metadata(spec) for spec in info.inputs],
        "outputs": [metadata(spec) for spec in info.outputs],
        "parameters": {"max_batch_size": info.max_batch, **({"batching": info.batching} if info.batching else {})},
    }


def refuse_load_parameters(parameters: dict[str, Parameter]) -> None:
    """Refuse what Triton's repository extension can be told and this one cannot.

    Raises:
        InvalidRequest: A configuration, files or other models are named.
    """
    told = {name: value for name, value in parameters.items() if (name, value) != ("unload_dependents", False)}
    if told:
        raise InvalidRequest(f"parameter {shown(next(iter(told)))} is not offered here", expected="no parameters")


def error_text(exc: RequestError) -> str:
    """One line for a client."""
    return str(exc)[:_ERROR_LENGTH]


def known_name(engine: Engine, name: str) -> str:
    """A model's name, for what is counted by it; empty where there is none: names that clients make up are not kept."""
    return name if name in engine.names() else ""


async def infer_counted(engine: Engine, request: InferRequest, statistics: Statistics) -> InferResult:
    """The engine's answer.

    Raises:
        RequestError: The engine refuses.
    """
    began = time.monotonic()
    try:
        result = await engine.infer(request)
    except RequestError:
        with contextlib.suppress(RequestError):  # it was unloaded meanwhile
            versions = engine.info(request.model, request.version).versions
            statistics.failed(request.model, request.version or versions[-1], time.monotonic() - began)
        raise
    statistics.answered(request, result, time.monotonic() - began)
    return result
