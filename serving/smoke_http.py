"""Asking a server for an answer, with the standard library: Open Inference Protocol v2, MLflow, BentoML."""

from __future__ import annotations

import http.client
import json
import math
import ssl
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from deploykit.errors import PackageError, first_line
from deploykit.extras import require
from deploykit.serving.v2_types import DATATYPES, DTYPES
from deploykit.specs import Array, Feeds, Signature

_HEADER = "Inference-Header-Content-Length"
_POLL_S = 0.2
# An answer in JSON is larger than its tensors; a server that sends without end is left.
_ANSWER_LIMIT_BYTES = 1 << 30


def v2_dtype(spec_dtype: str, name: str) -> str:
    """The protocol's name of a dtype.

    Raises:
        PackageError: It has none (complex numbers).
    """
    found = DATATYPES.get(spec_dtype)
    if found is None:
        raise PackageError(
            f"{name!r} is {spec_dtype}, which the Open Inference Protocol has no type for",
            hint="export the model with real and imaginary parts as two tensors",
        )
    return found


def pack(array: Array) -> bytes:
    """A tensor's bytes in row-major order; each string after its length in 4 bytes."""
    if array.dtype.kind in "OUS":
        texts = [t if isinstance(t, bytes) else str(t).encode() for t in array.reshape(-1).tolist()]
        return b"".join(struct.pack("<I", len(t)) + t for t in texts)
    plain = array.astype(array.dtype.newbyteorder("<"), copy=False) if array.dtype.byteorder == ">" else array
    return np.ascontiguousarray(plain).tobytes()


def unpack(data: bytes, dtype: str, shape: list[int], name: str) -> Array:
    """The inverse of `pack`.

    Args:
        data: The tensor's bytes.
        dtype: The protocol's name.
        shape: As the server says.
        name: For messages.

    Raises:
        PackageError: Bytes and shape do not fit together.
    """
    ours = DTYPES.get(dtype)
    count = math.prod(shape)
    if ours is None:
        raise PackageError(f"the server sends {name!r} as {dtype!r}, which is no type of the protocol")
    if ours != "string":
        kind = numpy_dtype(ours)
        if len(data) != count * kind.itemsize:
            raise PackageError(f"the server sends {len(data)} bytes for {name!r}", expected=f"{dtype}{shape}")
        return np.frombuffer(data, kind).reshape(shape)
    texts, at = [], 0
    while at + 4 <= len(data):
        (length,) = struct.unpack_from("<I", data, at)
        texts.append(data[at + 4 : at + 4 + length].decode(errors="replace"))
        at += 4 + length
    if at != len(data) or len(texts) != count:
        raise PackageError(f"the server sends {len(texts)} strings for {name!r}", expected=f"BYTES{shape}")
    return np.array(texts, dtype=object).reshape(shape)


def numpy_dtype(ours: str) -> np.dtype[Any]:
    """The numpy type of a tensor that is no string."""
    return np.dtype(require("ml_dtypes").bfloat16) if ours == "bfloat16" else np.dtype(ours)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that has a model.

    Attributes:
        url: Where, with a prefix of the path where there is one.
        model: The model's name there.
        protocol: "v2", "mlflow" or "bentoml".
        columns: Tensors [batch] that the server wants, and gives, as [batch, 1].
        wire: "binary" or "json", for v2.
        timeout_s: For one request.
        headers: Sent with every request.
        ca: File of certificates that the server's is checked with.
    """

    url: str
    model: str
    protocol: str
    columns: tuple[str, ...] = ()
    wire: str = "binary"
    timeout_s: float = 60.0
    headers: Mapping[str, str] = field(default_factory=dict)
    ca: str | None = None

    def wait(self, seconds: float) -> None:
        """Wait until the model is ready.

        Raises:
            PackageError: It is not, after that time.
        """
        path = {"v2": f"/v2/models/{quote(self.model)}/ready", "mlflow": "/ping", "bentoml": "/readyz"}[self.protocol]
        deadline = time.monotonic() + seconds
        while seconds > 0:
            try:
                status, _, _ = self._send("GET", path, b"", {})
                if status == 200:
                    return
                why = f"{path} says {status}"
            except PackageError as exc:
                why = exc.what
            if time.monotonic() > deadline:
                raise PackageError(f"{self.url} is not ready after {seconds:g} s: {why}")
            time.sleep(_POLL_S)

    def ask(self, inputs: Feeds, signature: Signature) -> dict[str, Array]:
        """Send one request.

        Args:
            inputs: Arrays by name.
            signature: Of the model: dtypes of the answer where the protocol does not say.

        Returns:
            The answer's arrays by name.

        Raises:
            PackageError: No answer, an error, or one that is not as the protocol says.
        """
        ask = {"v2": self._ask_v2, "mlflow": self._ask_mlflow, "bentoml": self._ask_bentoml}[self.protocol]
        return ask(inputs, signature)

    def _ask_v2(self, inputs: Feeds, signature: Signature) -> dict[str, Array]:
        dtypes = {s.name: v2_dtype(s.dtype, s.name) for s in signature.inputs}
        binary = self.wire == "binary"
        tensors, blobs = [], []
        for name, array in inputs.items():
            sent = array[:, None] if name in self.columns else array
            entry: dict[str, Any] = {"name": name, "shape": list(sent.shape), "datatype": dtypes[name]}
            if binary:
                blobs.append(pack(sent))
                entry["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                entry["data"] = sent.reshape(-1).tolist()
            tensors.append(entry)
        asked: dict[str, Any] = {"inputs": tensors}
        if binary:
            asked["parameters"] = {"binary_data_output": True}
        head = _json(asked)
        headers = {"Content-Type": "application/octet-stream" if binary else "application/json"}
        if binary:
            headers[_HEADER] = str(len(head))
        path = f"/v2/models/{quote(self.model)}/infer"
        status, got, body = self._send("POST", path, b"".join([head, *blobs]), headers)
        length = got.get(_HEADER.lower())
        if length is not None and not (length.isdecimal() and int(length) <= len(body)):
            raise PackageError(f"{self.url} answers with {_HEADER} {length!r:.40} for {len(body)} bytes")
        size = len(body) if length is None else int(length)
        answer = self._parsed(status, body[:size])
        return self._read_v2(answer, body[size:])

    def _read_v2(self, answer: Any, rest: bytes) -> dict[str, Array]:
        found: dict[str, Array] = {}
        at = 0
        try:
            for entry in answer["outputs"]:
                name, dtype, shape = str(entry["name"]), str(entry["datatype"]), [int(n) for n in entry["shape"]]
                size = (entry.get("parameters") or {}).get("binary_data_size")
                if size is None:
                    array = _from_list(entry["data"], DTYPES.get(dtype, ""), name).reshape(shape)
                else:
                    array = unpack(rest[at : at + size], dtype, shape, name)
                    at += size
                found[name] = array[:, 0] if name in self.columns else array
        except (KeyError, TypeError, ValueError, IndexError) as exc:
            raise PackageError(
                f"{self.url} answers otherwise than the Open Inference Protocol says ({first_line(exc)})"
            ) from exc
        return found

    def _ask_mlflow(self, inputs: Feeds, signature: Signature) -> dict[str, Array]:
        asked = _json({"inputs": {name: array.tolist() for name, array in inputs.items()}})
        status, _, body = self._send("POST", "/invocations", asked, {"Content-Type": "application/json"})
        return self._named(self._parsed(status, body), "predictions", signature)

    def _ask_bentoml(self, inputs: Feeds, signature: Signature) -> dict[str, Array]:
        asked = _json({"inputs": {name: array.tolist() for name, array in inputs.items()}})
        status, _, body = self._send("POST", "/predict", asked, {"Content-Type": "application/json"})
        return self._named({"outputs": self._parsed(status, body)}, "outputs", signature)

    def _named(self, answer: Any, key: str, signature: Signature) -> dict[str, Array]:
        """Nested lists by name; shapes are theirs, dtypes the model's."""
        tensors = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(tensors, dict):
            raise PackageError(f"{self.url} answers without {key!r} by name: {str(answer)[:200]}")
        found = {}
        for spec in signature.outputs:
            if spec.name in tensors:
                found[spec.name] = _from_list(tensors[spec.name], spec.dtype, spec.name)
        return found

    def _parsed(self, status: int, body: bytes) -> Any:
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError) as exc:
            raise PackageError(f"{self.url} answers {status} with {body[:200]!r}", expected="JSON") from exc
        if status != 200:
            why = answer.get("error", answer) if isinstance(answer, dict) else answer
            raise PackageError(f"{self.url} answers {status}: {str(why)[:500]}")
        return answer

    def _send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PackageError(f"{self.url!r} is no URL of a server", expected="http://HOST:PORT or https://HOST:PORT")
        try:
            port = parts.port
            context = ssl.create_default_context(cafile=self.ca) if parts.scheme == "https" else None
        except (ValueError, OSError) as exc:
            raise PackageError(f"{self.url} cannot be used ({first_line(exc)})") from exc
        made: http.client.HTTPConnection
        if context is not None:
            made = http.client.HTTPSConnection(parts.hostname, port, timeout=self.timeout_s, context=context)
        else:
            made = http.client.HTTPConnection(parts.hostname, port, timeout=self.timeout_s)
        try:
            made.request(method, parts.path.rstrip("/") + path, body, {**headers, **self.headers})
            got = made.getresponse()
            data = got.read(_ANSWER_LIMIT_BYTES + 1)
        except (OSError, http.client.HTTPException) as exc:
            raise PackageError(f"{self.url} does not answer ({first_line(exc)})", hint="is the server up?") from exc
        finally:
            made.close()
        if len(data) > _ANSWER_LIMIT_BYTES:
            raise PackageError(f"{self.url} answers with more than {_ANSWER_LIMIT_BYTES} bytes")
        return got.status, {k.lower(): v for k, v in got.getheaders()}, data


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, allow_nan=False).encode()
    except ValueError as exc:
        raise PackageError(
            "a golden request holds NaN or infinities, which JSON has not", hint="leave --wire out"
        ) from exc


def _from_list(values: Any, ours: str, name: str) -> Array:
    """Nested lists as an array of the dtype that they stand for."""
    try:
        if ours == "string":
            return np.array(values, dtype=object)
        return np.array(values).astype(numpy_dtype(ours), copy=False)
    except (TypeError, ValueError) as exc:
        raise PackageError(f"the server sends {name!r} as no array of {ours or 'a known type'}") from exc
