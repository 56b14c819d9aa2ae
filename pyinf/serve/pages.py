"""The two pages of the service: everything inline, nothing fetched but its own answers, no script but its own."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

__all__ = ["docs_page", "search_page"]


@functools.cache
def _asset(name: str, package: str = "pyinf.serve") -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["pretty"] = lambda value: json.dumps(value, ensure_ascii=False, indent=2)
    return environment


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _render(name: str, script: str, **values: Any) -> tuple[str, str]:
    """A page and its content security policy."""
    style = _asset("page.css", "pyinf.report") + _asset("serve.css")  # it looks like the report
    text = _environment().from_string(_asset(name)).render(style=Markup(style), script=Markup(script), **values)
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def search_page(title: str, facts: Mapping[str, Any]) -> tuple[str, str]:
    """The search page and its policy; ``facts``: ``token``, ``text`` (is there a tokenizer), ``k``, ``documents``."""
    return _render("search.html.j2", _asset("search.js"), title=title, facts=facts)


def docs_page(schema: Mapping[str, Any], token: bool) -> tuple[str, str]:
    """The description of the interface, made from its OpenAPI schema, and its policy."""
    calls = [
        {"path": path, "method": method.upper(), **call}
        for path, methods in schema["paths"].items()
        for method, call in methods.items()
    ]
    for call in calls:
        body = call.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        call["takes"] = _type(body) if body else None
        call["answers"] = [
            (status, response["description"], _type(_schema_of(response)))
            for status, response in call["responses"].items()
        ]
    types = [
        {
            "name": name,
            "description": model.get("description", ""),
            "examples": model.get("examples", []),
            "fields": [
                (field, _type(value), field in model.get("required", ()), value.get("description", ""))
                for field, value in model.get("properties", {}).items()
            ],
        }
        for name, model in schema.get("components", {}).get("schemas", {}).items()
        if name not in ("HTTPValidationError", "ValidationError")
    ]
    return _render("docs.html.j2", "", schema=schema, calls=calls, types=types, token=token)


def _schema_of(response: Mapping[str, Any]) -> Mapping[str, Any]:
    return response.get("content", {}).get("application/json", {}).get("schema", {})


def _type(schema: Mapping[str, Any]) -> str:
    """A type in words."""
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    low, high = schema.get("minimum"), schema.get("maximum", schema.get("exclusiveMaximum"))
    return kind + ("" if low is None else f" ≥ {low}") + ("" if high is None else f", up to {high}")
