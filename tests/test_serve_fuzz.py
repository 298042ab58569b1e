"""Whatever JSON a request holds, the server answers and does not fail: schemathesis over its own OpenAPI, hypothesis on
the fields that OpenAPI leaves open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")

import schemathesis
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import HELLO, serving
from starlette.testclient import TestClient

QUICK = settings(
    max_examples=100, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=8), parts, max_size=3),
    max_leaves=8,
)
MANY = settings(QUICK, max_examples=300)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    model = tiny.build("llama", tmp_path_factory.mktemp("tiny")).gguf_path
    with serving(model) as client:
        yield client


@pytest.fixture(scope="module")
def openapi(client: TestClient) -> Any:
    return schemathesis.openapi.from_dict(client.get("/openapi.json").json())


@QUICK
@given(data=st.data())
def test_no_request_like_those_it_describes_makes_it_fail(data: Any, client: TestClient, openapi: Any) -> None:
    operations = [found.ok() for found in openapi.get_all_operations()]
    case = data.draw(st.sampled_from(operations).flatmap(lambda operation: operation.as_strategy()))
    if isinstance(case.body, dict):  # else most of the time goes into long answers
        case.body |= {name: 1 for name in ("n", "max_tokens", "max_completion_tokens") if case.body.get(name)}
    arguments = case.as_transport_kwargs(base_url="http://localhost")
    found = client.request(**{name: value for name, value in arguments.items() if name != "cookies"})
    not_served = found.status_code == 501  # a path of another program's, or an option that was not given
    assert found.status_code < 500 or not_served, (found.status_code, found.text, arguments)


@MANY
@given(field=st.sampled_from(("steering", "model", "stop", "logit_bias", "response_format", "tools", "tool_choice",
                              "seed", "grammar", "stream_options", "temperature", "messages")), value=JSON)  # fmt: skip
def test_no_value_of_a_field_makes_it_fail(client: TestClient, field: str, value: Any) -> None:
    body = json.dumps({"messages": HELLO, "max_tokens": 2, field: value})
    found = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code in (200, 400), (found.status_code, found.text)
    if found.status_code == 400:
        assert "\n" not in found.json()["error"]["message"]


SCHEMA = st.recursive(
    st.sampled_from(({"type": "string"}, {"type": "integer"}, {"enum": ["a", 1, None]}, {"const": "x"}, {},
                     {"type": "string", "pattern": "^a+$"}, {"type": "string", "maxLength": 5}, {"$ref": "#"})),
    lambda inner: st.builds(lambda a: {"type": "array", "items": a, "maxItems": 3}, inner)
    | st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner)
    | st.builds(lambda a: {"type": "object", "properties": {"k": a}, "required": ["k"]}, inner),
    max_leaves=6,
)  # fmt: skip


@QUICK
@given(schema=SCHEMA)
def test_no_schema_makes_it_fail(client: TestClient, schema: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    body = {"messages": HELLO, "max_tokens": 12, "response_format": wanted}
    found = client.post("/v1/chat/completions", json=body)
    assert found.status_code in (200, 400), (found.status_code, found.text)
