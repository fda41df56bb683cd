"""The OpenAPI document: every route is in it, and what it says is what the service does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from flask import Blueprint, Flask

from atlas.api import create_app
from atlas.api.auth import require
from atlas.api.openapi import build, describe
from atlas.settings import Identity, Settings


@pytest.fixture
def app(tmp_path: Path) -> Flask:
    keys = Fernet.generate_key().decode()
    url = f"sqlite:///{tmp_path}/atlas.db"
    settings = Settings(environment="development", database_url=url, fernet_keys=keys)
    return create_app(settings, Identity(7, "0.1.0-0123456789ab", "green", "test1"))


def test_every_route_is_described(app: Flask) -> None:
    document = app.test_client().get("/openapi.json").get_json()
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    routes = [
        (rule, method)
        for rule in app.url_map.iter_rules()
        for method in rule.methods or ()
        if method not in ("HEAD", "OPTIONS")
    ]
    assert len(described) == len(routes) > 10
    assert ("/v1/documents/{document_id}", "GET") in described
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["summary"] and operation["responses"]


def test_a_route_without_a_description_is_named(app: Flask) -> None:
    extra = Blueprint("extra", __name__)
    extra.get("/v1/secret-door")(lambda: "")
    app.register_blueprint(extra)
    with pytest.raises(LookupError, match="/v1/secret-door"):
        build(app)


def test_an_operation_tells_its_scope_refusals_and_headers(app: Flask) -> None:
    document = build(app)
    submit: dict[str, Any] = document["paths"]["/v1/documents"]["post"]
    assert submit["security"] == [{"token": []}] and "`ingest`" in submit["description"]
    assert set(submit["responses"]) == {"200", "202", "400", "401", "403", "409", "413", "415", "422", "429", "503"}
    assert "Location" in submit["responses"]["202"]["headers"]
    assert "Retry-After" in submit["responses"]["503"]["headers"]
    assert set(submit["responses"]["422"]["content"]) == {"application/problem+json"}
    schema = submit["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/DocumentIn"}
    assert document["components"]["schemas"]["DocumentIn"]["additionalProperties"] is False
    limit, cursor, *_ = document["paths"]["/v1/documents"]["get"]["parameters"]
    assert (limit["schema"]["maximum"], cursor["schema"]["type"]) == (200, "string")
    (job,) = document["paths"]["/v1/jobs/{job_id}"]["get"]["parameters"]
    assert job["schema"] == {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
    assert document["paths"]["/healthz"]["get"]["security"] == []


def test_the_order_of_the_decorators_does_not_matter() -> None:
    def view() -> str:
        """A view."""
        return ""

    for made in (require("read")(describe({200: None})(view)), describe({200: None})(require("read")(view))):
        assert made.scope == "read" and made.operation.answers == {200: None}  # type: ignore[attr-defined]
