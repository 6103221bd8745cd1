"""Requests made by schemathesis from the served OpenAPI, fitting it or not: never a 5xx, and the server stays well."""

from __future__ import annotations

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation.modes import GenerationMode

from luthier.serve.limits import Limits
from luthier.serve.models import Served
from tests.serve.world import serving


def fuzz(model: Served, cases: int) -> dict[int, int]:
    """Send about this many requests; how many came to each status."""
    statuses: dict[int, int] = {}
    with serving([model], Limits(max_tokens=8)) as running, requests.Session() as session:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert {operation.path for operation in operations} > {"/v1/chat/completions", "/v1/completions", "/v1/models"}
        posts = [operation for operation in operations if operation.method.upper() == "POST"]
        # Bodies are where there is something to get wrong: two in three break the schema.
        asked = [one.as_strategy(generation_mode=GenerationMode.NEGATIVE) for one in posts] * 2
        asked += [one.as_strategy(generation_mode=GenerationMode.POSITIVE) for one in operations]

        @settings(
            max_examples=cases,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of(asked))
        def send(case: schemathesis.Case) -> None:
            response = case.call(base_url=running.url, session=session, timeout=60)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        send()
        assert running.get("/health").json() == {"status": "ok"}
        assert running.metric("luthier_running") == running.metric("luthier_waiting") == 0
        assert not running.said
    return statuses


def test_two_hundred_requests_of_schemathesis_meet_no_5xx(tiny_served: Served) -> None:
    statuses = fuzz(tiny_served, 200)
    assert sum(statuses.values()) >= 200
    assert statuses[400] > 50


@pytest.mark.slow
def test_ten_thousand_requests_of_schemathesis_meet_no_5xx(tiny_served: Served) -> None:
    assert sum(fuzz(tiny_served, 10_000).values()) >= 10_000
