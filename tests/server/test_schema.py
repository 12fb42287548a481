"""What the published OpenAPI document says is what the server does: cases made from it, valid and invalid, by schemathesis.

A few hundred cases each time; FATHOM_SCHEMA_CASES=300 makes so many of each kind for each operation, more than 2,000 in all.
"""

import os
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance, negative_data_rejection, not_a_server_error, response_headers_conformance, response_schema_conformance,
    status_code_conformance,
)

from fathom.server.app import create_app
from fathom.server.settings import ServerSettings
from tests.server.conftest import Running, running
from tests.server.tiny import tiny_engine

CASES = int(os.environ.get("FATHOM_SCHEMA_CASES", "12"))
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
          response_schema_conformance, negative_data_rejection)
OPERATIONS = (
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/{name}"),
    ("POST", "/v1/messages"), ("POST", "/anthropic/v1/messages/count_tokens"), ("GET", "/health"), ("GET", "/ready"), ("GET", "/version"),
    ("GET", "/metrics"))


@pytest.fixture(scope="module")
def tiny():
    """A server with a real engine."""
    engine = tiny_engine()
    options = ServerSettings(any_model=True)
    with running(engine, options, create_app(engine, options)) as server:
        yield server


def test_the_document_lists_every_operation_once(tiny: Running):
    document = tiny.app.openapi()
    found = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert found >= set(OPERATIONS) and not any("/beta" in path for _, path in found)
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_case_breaks_the_document(tiny: Running, method, path, mode):
    operation = schemathesis.openapi.from_dict(tiny.app.openapi())[path][method]
    if mode == GenerationMode.NEGATIVE and method == "GET":
        pytest.skip("nothing to get wrong")
    statuses = Counter()

    @settings(max_examples=CASES if method == "POST" or "{" in path else 1, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        response = case.call(base_url=tiny.url)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    check()
    assert tiny.engine.stats().blocks_used == 0 and not tiny.engine.has_work
    assert statuses.total() >= 1 and (mode == GenerationMode.POSITIVE or not statuses[200])
    print(method, path, mode.value, dict(statuses))
