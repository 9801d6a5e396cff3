"""The API described in OpenAPI 3.1, from the tables that requests are checked with. app.py serves it."""

from __future__ import annotations

from typing import Any

from web.fields import Record
from web.service import Service

_JSON = "application/json"
_TEXT: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer"}


def document(service: Service, keyed: bool) -> dict[str, Any]:
    """The description of a server that is ready."""
    chat, completion, rating = service.chat_body, service.completion_body, service.rating_body
    answer = _object(id=_TEXT, object=_TEXT, created=_COUNT, model=_TEXT, choices={"type": "array"})
    model = _object(id=_TEXT, object=_TEXT, created=_COUNT, owned_by=_TEXT)
    about = _object(model=_TEXT, description=_TEXT, context=_COUNT, disclaimer=_TEXT)
    paths: dict[str, Any] = {
        "/v1/chat/completions": {"post": _post("Answer a chat", chat, answer, stream=True)},
        "/v1/completions": {"post": _post("Go on from a text", completion, answer, stream=True)},
        "/v1/models": {"get": _get("The one model", _object(object=_TEXT, data={"type": "array", "items": model}))},
        "/v1/models/{model}": {"get": {**_get("A model by its name", model, ("404",)), **_named("model")}},
        "/api/about": {"get": _get("What answers here", about)},
        "/healthz": {"get": {**_get("Whether the server answers", _object(status=_TEXT)), "security": []}},
    }
    if service.feedback is not None:
        paths["/api/feedback"] = {
            "post": _post("Keep a rated answer; the receipt takes it back", rating, _object(id=_COUNT, receipt=_TEXT)),
        }
        taken = _get("Erase what was kept with that receipt, if anything was", _object(erased=_COUNT), ("404",))
        paths["/api/feedback/{receipt}"] = {"delete": {**taken, **_named("receipt")}}
    security = {"security": [{"key": []}]} if keyed else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ChatDoctor", "version": "1", "description": "For research only. Not medical advice."},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        **security,
    }


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _named(name: str) -> dict[str, Any]:
    """What stands in the path."""
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": _TEXT}]}


def _errors(*statuses: str) -> dict[str, Any]:
    error = _object(message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"type": ["string", "null"]})
    content = {_JSON: {"schema": _object(error=error)}}
    return {status: {"description": "Not answered", "content": content} for status in statuses}


def _get(about: str, schema: dict[str, Any], more: tuple[str, ...] = ()) -> dict[str, Any]:
    answered = {"description": about, "content": {_JSON: {"schema": schema}}}
    return {"summary": about, "responses": {"200": answered, **_errors("400", "401", "403", "429", "503", *more)}}


def _post(about: str, body: Record, schema: dict[str, Any], stream: bool = False) -> dict[str, Any]:
    operation = _get(about, schema, ("404", "408", "413", "415", "431"))
    operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": body.schema()}}}
    if stream:
        operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": _object(data=_TEXT)}  # an event
    return operation
