"""The server against requests made up from its own OpenAPI document: never a 5xx, and every error in OpenAI's form."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from support.servers import Served

pytestmark = pytest.mark.engine
_EXAMPLES = 20


def answered(case: Any) -> None:
    body = case.body
    if isinstance(body, dict) and ("messages" in body or "prompt" in body):
        for name in ("max_tokens", "max_completion_tokens"):  # else most of the time goes to generating
            if body.get(name, 1 << 20) is None or isinstance(body.get(name, 1 << 20), int):
                body[name] = min(3, body.get(name) or 3)
    response = case.call(timeout=60)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_whatever_comes_is_answered(served: Served, mode: schemathesis.GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 10
    for operation in operations:
        if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
            continue  # what takes nothing cannot be called wrongly
        checked = settings(
            max_examples=_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        checked(given(case=operation.as_strategy(generation_mode=mode))(answered))()
    assert served.get("/health") == {"status": "ok"} and served.get("/v1/kvpsi/status")["running"] == 0
