"""Which drafts of a request are traced: few of a long one, none of one that is not traced."""

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NoOpTracer, format_trace_id

from dspark_core.records import GenerateRequest
from services.verifier.request_traces import SINGLE_DRAFTS, RequestTraces

REQUEST = GenerateRequest(request_id="r", prompt_token_ids=(1,))


def test_the_first_drafts_are_traced_and_later_ones_ever_more_rarely() -> None:
    traces = RequestTraces()
    with TracerProvider().get_tracer("t").start_as_current_span("call") as span, traces.serving(REQUEST):
        told = [traces.next_draft("r") for _ in range(1000)]
        assert traces.next_draft("another") == ""
    traced = [number for number, context in enumerate(told, 1) if context]
    assert traced == [*range(1, SINGLE_DRAFTS + 1), 32, 64, 128, 256, 512]
    assert {context.split("-")[1] for context in told if context} == {
        format_trace_id(span.get_span_context().trace_id)
    }
    assert not traces.any


def test_a_request_that_is_not_sampled_is_not_traced() -> None:
    traces = RequestTraces()
    for tracer in (TracerProvider(sampler=ALWAYS_OFF).get_tracer("t"), NoOpTracer()):
        with tracer.start_as_current_span("call"), traces.serving(REQUEST):
            assert not traces.any
            assert traces.next_draft("r") == ""
