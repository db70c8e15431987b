"""The OpenAPI document of `http_app`."""

from __future__ import annotations

from typing import Any

import deploykit
from deploykit.serving.v2_types import DTYPES

Json = dict[str, Any]


def document(*, repository: bool, secured: bool) -> Json:
    """OpenAPI 3.1 of what an app answers.

    Args:
        repository: Whether the repository's routes are offered.
        secured: Whether a bearer token is needed.
    """
    paths: Json = {
        "/v2/health/live": {"get": _health("live", "Whether the process works")},
        "/v2/health/ready": {"get": _health("ready", "Whether every model answers and the server is not stopping")},
        "/v2": {"get": _operation("serverMetadata", "Name, version and extensions", _ref("ServerMetadata"))},
        "/v2/openapi.json": {"get": _operation("openapi", "This document", {"type": "object"})},
    }
    for base, suffix in (("/v2/models/{name}", ""), ("/v2/models/{name}/versions/{version}", "Version")):
        inside = [_path_parameter(part) for part in ("name", "version") if f"{{{part}}}" in base]
        paths[base] = {
            "parameters": inside,
            "get": _operation(f"model{suffix}Metadata", "Inputs and outputs", _ref("ModelMetadata"), 404, 503),
        }
        ready = _operation(f"model{suffix}Ready", "Whether the model answers", _ref("ModelReady"), 404)
        ready["responses"]["503"] = _response("It does not", {"anyOf": [_ref("ModelReady"), _ref("Error")]})
        paths[f"{base}/ready"] = {"parameters": inside, "get": ready}
        paths[f"{base}/infer"] = {"parameters": inside, "post": _infer(f"model{suffix}Infer")}
    if repository:
        paths |= _repository_paths()
    for path, item in paths.items():
        if secured and not path.startswith("/v2/health/"):
            for operation in item.values():
                if isinstance(operation, dict):
                    operation["security"] = [{"bearer": []}]
                    operation["responses"]["401"] = _response("No valid bearer token", _ref("Error"))
    components: Json = {"schemas": _schemas()}
    if secured:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "DeployKit inference server",
            "version": deploykit.__version__,
            "description": "The Open Inference Protocol, version 2, with the binary tensor data extension.",
        },
        "paths": paths,
        "components": components,
    }


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _response(text: str, schema: Json, kind: str = "application/json") -> Json:
    return {"description": text, "content": {kind: {"schema": schema}}}


_REFUSALS = {
    400: "The request does not fit the protocol or the model",
    403: "The server was not started with that, or the client may not have it",
    404: "No such model or version",
    408: "The body did not arrive in time",
    413: "Over a limit",
    429: "As many requests wait as may wait",
    500: "The runtime failed, or the server has a fault",
    503: "The model or the server is starting or stopping, or the process that computed the request died",
    504: "The time of the request ran out",
}


def _operation(identity: str, text: str, schema: Json, *refusals: int) -> Json:
    answers: Json = {"200": _response("Done", schema)}
    answers |= {str(code): _response(_REFUSALS[code], _ref("Error")) for code in refusals}
    return {"operationId": identity, "summary": text, "responses": answers}


def _health(name: str, text: str) -> Json:
    schema = {"type": "object", "properties": {name: {"type": "boolean"}}, "required": [name]}
    operation = _operation(name, text, schema)
    operation["responses"]["503"] = _response("It is not so", schema)
    return operation


def _path_parameter(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _infer(identity: str) -> Json:
    operation = _operation(identity, "Run the model", _ref("InferenceResponse"), 400, 404, 408, 413, 429, 500, 503, 504)
    operation["description"] = (
        "JSON, or JSON with binary tensor data behind it; then Inference-Header-Content-Length is the length of the "
        "JSON. Bodies may be compressed. In an answer NaN is null; a tensor that holds an infinity holds the words "
        "NaN, Infinity and -Infinity, which are not JSON: ask for binary data where that can be."
    )
    operation["parameters"] = [
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "required": False,
            "description": "Length of the JSON in front of binary tensor data, in bytes, after inflating",
            "schema": {"type": "integer", "minimum": 0},
        },
        {
            "name": "Content-Encoding",
            "in": "header",
            "required": False,
            "schema": {"type": "string", "enum": ["identity", "gzip", "deflate"]},
        },
    ]
    binary = {"schema": {"type": "string", "format": "binary"}}
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": _ref("InferenceRequest")}, "application/octet-stream": binary},
    }
    operation["responses"]["200"]["content"]["application/octet-stream"] = binary
    operation["responses"]["200"]["headers"] = {
        "Inference-Header-Content-Length": {
            "description": "Length of the JSON in front of binary tensor data, where there are some",
            "schema": {"type": "integer"},
        }
    }
    return operation


def _repository_paths() -> Json:
    index = _operation(
        "repositoryIndex", "Every model and version", {"type": "array", "items": _ref("IndexEntry")}, 400, 408, 413
    )
    index["requestBody"] = _body({"ready": {"type": "boolean"}})
    paths: Json = {"/v2/repository/index": {"post": index}}
    for verb, text in (("load", "Load a model, or its newest version"), ("unload", "Answer no more requests to it")):
        operation = _operation(f"repository{verb.title()}", text, {"type": "object"}, 400, 404, 408, 413, 500, 503)
        told = {"type": "object", "properties": {"unload_dependents": {"const": False}}, "additionalProperties": False}
        operation["requestBody"] = _body({"parameters": told})
        paths[f"/v2/repository/models/{{name}}/{verb}"] = {"parameters": [_path_parameter("name")], "post": operation}
    return paths


def _body(properties: Json) -> Json:
    schema = {"type": "object", "properties": properties}
    return {"required": False, "content": {"application/json": {"schema": schema}}}


def _schemas() -> Json:
    parameters = {
        "type": "object",
        "additionalProperties": {"type": ["string", "number", "boolean"]},
    }
    datatype = {"type": "string", "enum": list(DTYPES)}
    scalar = {"type": ["number", "string", "boolean"]}
    values = {
        "type": "array",
        "items": {"anyOf": [scalar, {"type": "array"}]},
        "description": "Flat in row-major order, or nested as the shape is",
    }
    tensor = {
        "name": {"type": "string"},
        "datatype": datatype,
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    }
    declared = {**tensor, "shape": {"type": "array", "items": {"type": "integer", "minimum": -1}}}
    binary = {
        **parameters,
        "properties": {"binary_data_size": {"type": "integer", "minimum": 0}},
    }
    wanted = {**parameters, "properties": {"binary_data": {"type": "boolean"}}}
    asked = {
        **parameters,
        "properties": {
            "binary_data_output": {"type": "boolean"},
            "timeout": {"type": "integer", "minimum": 0, "description": "Microseconds; 0 is none"},
        },
    }
    return {
        "Error": _object({"error": {"type": "string"}}, "error"),
        "ServerMetadata": _object(
            {
                "name": {"type": "string"},
                "version": {"type": "string"},
                "extensions": {"type": "array", "items": {"type": "string"}},
            },
            "name", "version", "extensions",
        ),
        "TensorMetadata": _object(declared, *declared),
        "ModelMetadata": _object(
            {
                "name": {"type": "string"},
                "versions": {"type": "array", "items": {"type": "string"}},
                "platform": {"type": "string"},
                "inputs": {"type": "array", "items": _ref("TensorMetadata")},
                "outputs": {"type": "array", "items": _ref("TensorMetadata")},
                "parameters": {
                    **parameters,
                    "properties": {
                        "max_batch_size": {
                            "type": "integer", "minimum": 0, "description": "Most rows of joined requests; 0 for none",
                        },
                        "batching": {"type": "string", "description": "Why requests are not joined"},
                    },
                },
            },
            "name", "versions", "platform", "inputs", "outputs",
        ),
        "ModelReady": _object({"name": {"type": "string"}, "ready": {"type": "boolean"}}, "name", "ready"),
        "RequestInput": _object({**tensor, "parameters": binary, "data": values}, *tensor),
        "RequestOutput": _object({"name": {"type": "string"}, "parameters": wanted}, "name"),
        "InferenceRequest": _object(
            {
                "id": {"type": "string", "maxLength": 1024},
                "parameters": asked,
                "inputs": {"type": "array", "items": _ref("RequestInput")},
                "outputs": {"type": "array", "items": _ref("RequestOutput")},
            },
            "inputs",
        ),
        "ResponseOutput": _object(
            {
                **tensor,
                "parameters": binary,
                "data": {"type": "array", "items": {"type": ["number", "string", "boolean", "null"]}},
            },
            *tensor,
        ),
        "InferenceResponse": _object(
            {
                "id": {"type": "string"},
                "model_name": {"type": "string"},
                "model_version": {"type": "string"},
                "outputs": {"type": "array", "items": _ref("ResponseOutput")},
            },
            "model_name", "model_version", "outputs",
        ),
        "IndexEntry": _object(
            {key: {"type": "string"} for key in ("name", "version", "state", "reason")}, "name"
        ),
    }  # fmt: skip


def _object(properties: Json, *required: str) -> Json:
    return {"type": "object", "properties": properties, "required": list(required)}
