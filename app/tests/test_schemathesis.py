"""Schemathesis holds a live service to its OpenAPI document: no 5xx, no answer that was not described.

The inputs are drawn anew for each operation, in the same order in each run. Negative control: a document that
denies what the service does is found out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from cryptography.fernet import Fernet
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from running import TOKEN, Deployment
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    JsonSchemaError,
    UndefinedStatusCode,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from atlas.api import create_app
from atlas.api.openapi import build
from atlas.settings import Identity, Settings

EXAMPLES = int(os.environ.get("ATLAS_SCHEMATHESIS_EXAMPLES", "25"))
PATH = "/nowhere/atlas.db"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
# In the same order in each run.
BOUNDED = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@schemathesis.serializer("application/x-ndjson")
def ndjson(_context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service that holds a few documents."""
    deployment = Deployment(tmp_path_factory.mktemp("service"))
    deployment.prepare()
    _, _, port = deployment.start_ready("api")
    with deployment.client(port) as client:
        for number in range(3):
            document = {"content": f"words {number}", "content_type": "text/plain", "tags": ["a"]}
            assert client.post("/v1/documents", json=document).status_code == 202
    yield f"http://127.0.0.1:{port}"
    deployment.close()


def operations() -> list[Any]:
    """Every operation of the document, which takes no store to make."""
    keys, identity = Fernet.generate_key().decode(), Identity(7, "0.1.0-0123456789ab", "blue", "test1")
    app = create_app(Settings(environment="development", database_url=f"sqlite:///{PATH}", fernet_keys=keys), identity)
    return [found.ok() for found in schemathesis.openapi.from_dict(build(app)).get_all_operations()]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: str(mode.value))
@pytest.mark.parametrize("operation", operations(), ids=lambda operation: str(operation.label))
def test_every_answer_is_described(service: str, operation: Any, mode: GenerationMode) -> None:
    @given(operation.as_strategy(generation_mode=mode))
    @BOUNDED
    def ask(case: Any) -> None:
        case.call_and_validate(base_url=service, checks=CHECKS, headers=HEADERS, timeout=30)

    try:
        ask()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE, "nothing can be sent"


@pytest.mark.parametrize("lie", ["status", "schema"])
def test_a_document_that_is_not_true_is_found_out(service: str, lie: str) -> None:
    told = httpx.get(f"{service}/openapi.json", trust_env=False).json()
    if lie == "status":
        del told["paths"]["/v1/documents"]["get"]["responses"]["200"]
    else:
        told["components"]["schemas"]["DocumentPage"]["required"].append("missing")
    case = schemathesis.openapi.from_dict(told)["/v1/documents"]["GET"].Case()
    with pytest.raises(BaseExceptionGroup) as found:
        case.call_and_validate(base_url=service, checks=CHECKS, headers=HEADERS, timeout=30)
    wanted = {"status": UndefinedStatusCode, "schema": JsonSchemaError}[lie]
    assert [type(error) for error in found.value.exceptions] == [wanted]
