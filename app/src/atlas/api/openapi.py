"""The OpenAPI document at /openapi.json, made from the views themselves.

How to describe a view: give it a docstring (the first line is the summary) and put `describe` under the route:

    @blueprint.get("/<int:job_id>")
    @require("read")
    @describe({200: JobOut})
    def show(job_id: int) -> Response:
        \"\"\"Show a job with its history.\"\"\"

`require` adds the security scheme and the refusals 401, 403, 429 and 503. Query arguments and JSON bodies are declared
as pydantic models and read with `read_query(Model)` and `read_body(Model)`, so that what is described is what is
checked: their refusals (422, and 400, 413, 415 for a body) are added too. Path parameters come from the route, and
with them 404.
tests/test_openapi.py fails for a route without a description, tests/test_schemathesis.py for what was not described.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from flask import Blueprint, Flask, Request, Response, current_app, jsonify, request
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema
from pydantic.json_schema import models_json_schema
from werkzeug.routing import BaseConverter, IntegerConverter, Rule

import atlas
from atlas.api.problems import Problem, ProblemOut
from atlas.db import milliseconds

blueprint = Blueprint("openapi", __name__)
V = TypeVar("V", bound=Callable[..., Any])
M = TypeVar("M", bound=BaseModel)
Answers = Mapping[int, type[BaseModel] | str | None]

JSON, PROBLEM = "application/json", "application/problem+json"
REFERENCE = "#/components/schemas/{model}"
_HEADERS = {
    "X-Request-Id": "The id of this request in the log: that of the request header, if it gave one.",
    "X-Atlas-Release": "The release that answered.",
    "X-Atlas-Slot": "The slot that answered.",
}
_RETRY = {"Retry-After": "Seconds after which to try again."}
_PROBLEM_HEADERS = {
    401: {"WWW-Authenticate": "How to authenticate."},
    403: {"WWW-Authenticate": "The scope that the token lacks."},
    429: _RETRY,
    503: _RETRY,
}


LIST_LIMIT = 200
# A moment in RFC 3339, read as milliseconds.
Moment = Annotated[
    int,
    BeforeValidator(lambda value: _moment(value)),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]


class PageQuery(BaseModel):
    """The arguments of every list. `cursor` is the `next` of the page before."""

    limit: int = Field(default=50, ge=1, le=LIST_LIMIT)
    cursor: str | None = Field(default=None, pattern="^[0-9]{1,18}$")


@dataclass(frozen=True)
class Operation:
    """What `describe` was told."""

    answers: Answers
    problems: Sequence[int]
    query: type[BaseModel] | None
    body: type[BaseModel] | None
    body_type: str
    request_headers: Mapping[str, Mapping[str, Any]]
    answer_headers: Mapping[str, str]
    security: str | None


def describe(
    answers: Answers,
    *,
    problems: Sequence[int] = (),
    query: type[BaseModel] | None = None,
    body: type[BaseModel] | None = None,
    body_type: str = JSON,
    request_headers: Mapping[str, Mapping[str, Any]] | None = None,
    answer_headers: Mapping[str, str] | None = None,
    security: str | None = None,
) -> Callable[[V], V]:
    """Say what a view takes and answers.

    `answers` holds, for each status, the model of a JSON answer, the media type of another one, or None if there is no
    body. `problems` are further statuses, answered with a problem. `request_headers` are JSON schemas by header,
    `answer_headers` descriptions. `security` names a scheme of SECURITY for a view without `require`.
    """

    def decorate(view: V) -> V:
        view.operation = Operation(  # type: ignore[attr-defined]
            answers, problems, query, body, body_type, request_headers or {}, answer_headers or {}, security
        )
        return view

    return decorate


def read_query(model: type[M]) -> M:
    """The arguments of the request's query. Raises Problem."""
    for name, value in request.args.items():
        if "\0" in value:
            raise Problem(422, f"{name}: must not hold NUL")
    try:
        return model.model_validate(request.args.to_dict())
    except ValidationError as error:
        raise not_valid(error) from None


def read_body(model: type[M]) -> M:
    """What the request's body holds, which must be JSON. Raises Problem."""
    asked: Request = request._get_current_object()  # type: ignore[attr-defined]
    if asked.environ.get("CONTENT_TYPE") != JSON and asked.mimetype != JSON:
        raise Problem(415, f"send the body as {JSON}")
    try:
        return model.model_validate_json(asked.get_data())
    except ValidationError as error:
        raise not_valid(error) from None


def not_valid(error: ValidationError) -> Problem:
    """What is wrong with what was sent: 400 for what is no JSON, else 422 with each field."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return Problem(400, "the body is not valid JSON")
    errors = [
        {"field": ".".join(map(str, item["loc"])), "message": item["msg"].removeprefix("Value error, ")}
        for item in found
    ]
    detail = "; ".join(f"{item['field']}: {item['message']}".removeprefix(": ") for item in errors)
    return Problem(422, detail, errors=errors)


def _moment(value: str) -> int:
    try:
        return milliseconds(value)
    except (ValueError, OverflowError, TypeError):
        raise ValueError("must be a moment in RFC 3339, like 2026-01-31T12:00:00Z") from None


SECURITY = {"token": {"type": "http", "scheme": "bearer"}}


@blueprint.get("/openapi.json")
@describe({200: JSON})
def document() -> Response:
    """This document."""
    known = current_app.extensions
    if "openapi" not in known:
        known["openapi"] = build(current_app)
    return jsonify(known["openapi"])


@describe({200: "text/css", 206: "text/css", 304: None}, problems=(404, 416))
def _static() -> None:
    """A file of the status page."""


def build(app: Flask) -> dict[str, Any]:
    """The document of an application. Raises LookupError for a route without a description."""
    operations = [
        (rule, method, _static if rule.endpoint == "static" else app.view_functions[rule.endpoint])
        for rule in app.url_map.iter_rules()
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
    ]
    missing = [str(rule) for rule, _, view in operations if not (_told(view) and view.__doc__)]
    if missing:
        raise LookupError(f"not described: {', '.join(missing)}; see atlas.api.openapi")
    schemas = _Schemas([told for _, _, view in operations if (told := _told(view))])
    paths: dict[str, dict[str, Any]] = {}
    for rule, method, view in operations:
        path = re.sub(r"<(?:[^:<>]+:)?([^<>]+)>", r"{\1}", rule.rule)
        paths.setdefault(path, {})[method.lower()] = _operation(rule, view, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Atlas", "version": atlas.__version__, "description": inspect.cleandoc(atlas.__doc__ or "")},
        "paths": paths,
        "components": {"schemas": schemas.components, "securitySchemes": SECURITY},
    }


def _told(view: Any) -> Any:
    return getattr(view, "operation", None)


class _Schemas:
    """The JSON schemas of all models: what is read by one, and what is written by the other name of it."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        read = {model for each in operations for model in (each.query, each.body) if model}
        written = {model for each in operations for model in each.answers.values() if isinstance(model, type)}
        wanted = [(model, "validation") for model in read] + [(model, "serialization") for model in written]
        wanted.append((ProblemOut, "serialization"))
        wanted.sort(key=lambda pair: pair[0].__name__)
        self._found, definitions = models_json_schema(wanted, ref_template=REFERENCE)  # type: ignore[arg-type]
        self.components: dict[str, Any] = definitions.get("$defs", {})

    def read(self, model: type[BaseModel]) -> dict[str, Any]:
        return self._found[model, "validation"]

    def written(self, model: type[BaseModel]) -> dict[str, Any]:
        return self._found[model, "serialization"]

    def resolved(self, model: type[BaseModel]) -> dict[str, Any]:
        """The schema itself, where a reference will not do."""
        found: dict[str, Any] = self.components[self.read(model)["$ref"].rpartition("/")[2]]
        return found


def _operation(rule: Rule, view: Callable[..., Any], schemas: _Schemas) -> dict[str, Any]:
    told: Operation = _told(view)
    scope: str | None = getattr(view, "scope", None)
    problems = {*told.problems, *((401, 403, 429, 503) if scope else ()), *((422,) if told.query else ())}
    problems |= {400, 413, 415, 422} if told.body else set()
    problems |= {404} if rule._converters else set()
    summary, _, rest = inspect.cleandoc(view.__doc__ or "").partition("\n")
    security = told.security or ("token" if scope else None)
    described = " ".join(rest.split()) + (f" Needs the scope `{scope}`." if scope else "")
    found: dict[str, Any] = {
        "operationId": rule.endpoint,
        "summary": summary.rstrip("."),
        "description": described.strip(),
        "tags": [rule.endpoint.partition(".")[0]],
        "security": [{security: []}] if security else [],
        "parameters": [*_path(rule), *_query(told, schemas), *_headers(told)],
        "responses": {},
    }
    if told.body:
        schema = schemas.read(told.body) if told.body_type == JSON else {"type": "string"}
        found["requestBody"] = {"required": True, "content": {told.body_type: {"schema": schema}}}
    for status, answer in sorted(told.answers.items()):
        content: dict[str, Any] | None = None
        if isinstance(answer, str):
            content = {answer: {}}
        elif answer is not None:
            content = {JSON: {"schema": schemas.written(answer)}}
        found["responses"][str(status)] = _response(status, content, told.answer_headers)
    for status in sorted(problems - set(told.answers)):
        content = {PROBLEM: {"schema": schemas.written(ProblemOut)}}
        found["responses"][str(status)] = _response(status, content, _PROBLEM_HEADERS.get(status, {}))
    return found


def _response(status: int, content: dict[str, Any] | None, headers: Mapping[str, str]) -> dict[str, Any]:
    shown = {
        name: {"description": description, "schema": {"type": "string"}}
        for name, description in {**headers, **_HEADERS}.items()
    }
    described = {"description": HTTPStatus(status).phrase, "headers": shown}
    return described if content is None else described | {"content": content}


def _path(rule: Rule) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": _schema(converter)}
        for name, converter in rule._converters.items()
    ]


def _schema(converter: BaseConverter) -> dict[str, Any]:
    if isinstance(converter, IntegerConverter):
        return {"type": "integer", "minimum": 0, "maximum": converter.max}
    items = getattr(converter, "items", None)
    return {"type": "string", "enum": sorted(items)} if items else {"type": "string", "minLength": 1}


def _query(told: Operation, schemas: _Schemas) -> list[dict[str, Any]]:
    if told.query is None:
        return []
    schema = schemas.resolved(told.query)
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": _not_null(value)}
        for name, value in schema["properties"].items()
    ]


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """An argument that is left out is None to us; nobody can send one that is null."""
    kinds: list[dict[str, Any]] = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    if len(kinds) != 1:
        return schema
    return {name: value for name, value in schema.items() if name not in ("anyOf", "default")} | kinds[0]


def _headers(told: Operation) -> list[dict[str, Any]]:
    return [{"name": name, "in": "header", "schema": schema} for name, schema in told.request_headers.items()]
