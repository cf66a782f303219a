"""Requests that the schema allows, and such that it does not, never end in a fault of the server."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from listening import listening
from schemathesis import GenerationMode

from sdjax.serve.limits import Limits

SETTINGS = settings(
    max_examples=25,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
def test_no_request_is_a_fault(served):
    """Of a server that refuses long requests, so that every answer comes soon."""
    limits = Limits(max_steps=4, max_side=64, max_images=2)
    engine, sent = served(batch_sizes=(4,), queue_length=10_000, limits=limits), {}
    with listening(engine) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        for operation in [found.ok() for found in schema.get_all_operations()]:
            cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))

            @SETTINGS
            @given(cases)
            def ask(case):
                answer = case.call(timeout=120)
                sent[case.operation.label] = sent.get(case.operation.label, 0) + 1
                assert answer.status_code < 500, f"{case.as_curl_command()}: {answer.text}"
                assert "Traceback" not in answer.text

            ask()
    assert len(sent) >= 40
    print(len(sent), "operations,", sum(sent.values()), "requests")
