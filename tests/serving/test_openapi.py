"""The OpenAPI document says what the server does: by hand, and by what schemathesis makes of it."""

from __future__ import annotations

import http.client
import json

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from deploykit.serving.openapi import document

load_all_checks()
# What depends on more than a schema can say: shapes have to fit data, and data the model.
_BEYOND = {
    "positive_data_acceptance",
    "negative_data_rejection",
    "ignored_auth",
    "use_after_free",
    "ensure_resource_availability",
}
JUDGED = [check for name, check in ((n, CHECKS.get_one(n)) for n in CHECKS.get_all_names()) if name not in _BEYOND]


@pytest.mark.parametrize("repository", [True, False])
@pytest.mark.parametrize("secured", [True, False])
def test_references_and_names(repository, secured):
    doc = document(repository=repository, secured=secured)
    text = json.dumps(doc)
    for name in doc["components"]["schemas"]:
        jsonschema.Draft202012Validator.check_schema(doc["components"]["schemas"][name])
        assert f"#/components/schemas/{name}" in text or name in ("ServerMetadata", "IndexEntry")
    operations = [o for item in doc["paths"].values() for o in item.values() if isinstance(o, dict)]
    assert len({o["operationId"] for o in operations}) == len(operations)
    assert any("repository" in path for path in doc["paths"]) == repository
    assert all(("security" in o) == (secured and o["operationId"] not in ("live", "ready")) for o in operations)


def fetch(port, path="/v2/openapi.json"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    try:
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def test_every_path_is_a_route_and_every_route_a_path(fake_engine):
    from deploykit.serving.http_app import http_app

    app = http_app(fake_engine(), repository=True)
    assert {route.path for route in app.routes} == set(document(repository=True, secured=False)["paths"])
    methods = {(route.path, method.lower()) for route in app.routes for method in route.methods if method != "HEAD"}
    described = {
        (path, method)
        for path, item in document(repository=True, secured=False)["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert methods == described


def test_the_server_publishes_it(served):
    assert fetch(served.port) == document(repository=True, secured=False)


def operations():
    doc = document(repository=True, secured=False)
    for path, item in doc["paths"].items():
        for method in item.keys() - {"parameters"}:
            yield method.upper(), path, GenerationMode.POSITIVE
            # What is wrong in a path alone takes long to find and is tried elsewhere.
            if "requestBody" in item[method]:
                yield method.upper(), path, GenerationMode.NEGATIVE


@pytest.mark.parametrize(("method", "path", "mode"), list(operations()), ids=str)
def test_schemathesis(served, method, path, mode):
    """Whatever is sent, the answer is one that the document has, in the form that it says."""
    doc = fetch(served.port)
    # Half of what is asked should find a model.
    for item in doc["paths"].values():
        for parameter in item.get("parameters", []):
            if parameter["name"] == "name":
                parameter["schema"] = {"anyOf": [{"enum": ["nan", "pair", "echo_BYTES"]}, parameter["schema"]]}
    operation = schemathesis.openapi.from_dict(doc)[path][method]
    seen = set()

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def judge(case):
        response = case.call_and_validate(base_url=f"http://{served.address}", checks=JUDGED)
        seen.add(response.status_code)

    judge()
    assert seen
