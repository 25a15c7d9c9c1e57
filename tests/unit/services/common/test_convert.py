"""Conversions lose nothing, fill in the contract's defaults, and refuse what the contract forbids."""

import dataclasses
import math

import pytest
from dspark_proto.v1 import common_pb2, scheduler_pb2, verifier_pb2
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind, LogitAdjustments
from dspark_core.records import (
    MAX_SEED,
    AssignRequest,
    DraftOrigin,
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    Replica,
    ReplicaKind,
    RequestSurvival,
    Role,
    RoundReport,
    SamplingParams,
    ScalingBand,
    SpeculationOptions,
    SpeculationStats,
    StepTime,
    TokenLogprobs,
    Verification,
    VerifierDescription,
    VerifierLoad,
    VerifyPlan,
)
from services.common import cluster_convert, convert
from services.common.limits import MOST_RUNNING

token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=8).map(tuple)
counts = st.integers(0, 2**32 - 1)
seconds = st.floats(0, 1e6)
round_seconds = st.just(0.0) | st.floats(1e-7, 3600.0)

sampling = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_k=counts,
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    seed=st.none() | st.integers(0, MAX_SEED),
)
speculation = st.builds(
    SpeculationOptions,
    enabled=st.booleans(),
    verification=st.sampled_from([None, Verification.COUPLED]),
    max_draft_tokens=st.none() | counts,
)
requests = st.builds(
    GenerateRequest,
    request_id=st.text(min_size=1),
    prompt_token_ids=token_ids.filter(bool),
    max_tokens=st.none() | st.integers(1, 2**32 - 1),
    sampling=sampling,
    stop_token_ids=token_ids,
    speculation=speculation,
    min_tokens_per_second=st.none() | st.floats(0, 1e6, exclude_min=True),
    floor_promised=st.booleans(),
    cache_salt=st.text(max_size=8),
    attempt=counts,
    adjustments=st.builds(
        LogitAdjustments,
        logit_bias=st.dictionaries(counts, st.floats(-100, 100), max_size=4).map(lambda d: tuple(d.items())),
        repetition_penalty=st.floats(0.01, 100),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        min_tokens=counts,
    ),
    top_logprobs=st.none() | st.integers(0, 20),
    grammar=st.none()
    | st.builds(Grammar, kind=st.sampled_from(GrammarKind), text=st.text(min_size=1).map("{}.".format)),
    weights=st.text(),
)
stats = st.builds(
    SpeculationStats,
    rounds=counts,
    drafted_tokens=counts,
    verified_tokens=counts,
    accepted_tokens=counts,
    committed_tokens=counts,
    draft_seconds=seconds,
    verify_seconds=seconds,
)
chunks = st.builds(
    GenerateChunk,
    token_ids=token_ids,
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stats=st.none() | stats,
    cached_prompt_tokens=counts,
    logprobs=st.lists(
        st.builds(
            TokenLogprobs,
            st.floats(-1e9, 0),
            st.lists(st.tuples(counts, st.floats(-1e9, 0)), max_size=3).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    weights=st.text(),
)
replicas = st.builds(
    Replica,
    replica_id=st.text(min_size=1),
    role=st.sampled_from(Role),
    address=st.text(min_size=1),
    model=st.text(min_size=1),
    draining=st.booleans(),
    running_requests=counts,
    waiting_requests=counts,
    free_kv_fraction=st.floats(0, 1),
    weights=st.text(),
)
survival = st.lists(st.floats(0, 1, width=32), max_size=7).map(lambda v: tuple(sorted(v, reverse=True)))
kinds = st.builds(ReplicaKind, model=st.text(), engine=st.text(), hardware=st.text(), dtype=st.text())
reports = st.builds(
    RoundReport,
    replica_id=st.text(min_size=1),
    round=st.integers(0, 2**63),
    requests=st.lists(
        st.builds(
            RequestSurvival,
            sequence_id=st.text(),
            survival=survival,
            verify_length=counts,
            accepted=st.just(0),
            origin=st.sampled_from(DraftOrigin),
            temperature=st.floats(0, 2),
        ),
        max_size=4,
    ).map(tuple),
    batch_tokens=counts,
    step_seconds=round_seconds,
    draft_seconds=round_seconds,
    context_tokens=counts,
    cohorts=st.sampled_from((1, 2)),
    kind=st.none()
    | st.builds(ReplicaKind, model=st.text(), engine=st.text(), hardware=st.text(), dtype=st.text()),
    profile=st.lists(st.tuples(st.integers(1, 64), st.integers(0, 64), counts), unique=True, max_size=4).map(
        lambda points: tuple(
            StepTime(requests=r, batch_tokens=r + more, context_tokens=context, seconds=0.001 * r)
            for r, more, context in points
        )
    ),
    load=st.none()
    | st.builds(
        VerifierLoad,
        running_requests=counts,
        waiting_requests=counts,
        free_kv_fraction=st.floats(0, 1),
        max_running_requests=counts,
        draining=st.booleans(),
        new_request_ids=st.lists(st.text(min_size=1), max_size=3).map(tuple),
        speed_floors=st.lists(st.floats(0.5, 1e6), max_size=3).map(tuple),
    ),
)
assignments = st.builds(
    AssignRequest,
    request_id=st.text(min_size=1),
    model=st.text(min_size=1),
    prompt_tokens=counts,
    exclude_replica_ids=st.lists(st.text(), max_size=3).map(tuple),
    prefix_hashes=st.lists(st.integers(0, 2**64 - 1), max_size=8).map(tuple),
    min_tokens_per_second=st.floats(0, 1e6),
    floor_promised=st.booleans(),
    tier=st.text(),
    wait_seconds=st.floats(0, 3600),
    weights=st.text(),
)


@given(assignments)
def test_assignments_survive_the_wire(assignment: AssignRequest):
    message = cluster_convert.assign_request_to_proto(assignment)
    parsed = scheduler_pb2.AssignRequest.FromString(message.SerializeToString())
    assert cluster_convert.assign_request_from_proto(parsed) == assignment


@given(requests)
def test_requests_survive_the_wire(request: GenerateRequest):
    message = convert.generate_request_to_proto(request)
    parsed = verifier_pb2.GenerateRequest.FromString(message.SerializeToString())
    assert convert.generate_request_from_proto(parsed) == request


@given(chunks)
def test_chunks_survive_the_wire(chunk: GenerateChunk):
    message = convert.generate_chunk_to_proto(chunk)
    parsed = verifier_pb2.GenerateChunk.FromString(message.SerializeToString())
    assert convert.generate_chunk_from_proto(parsed) == chunk


@given(replicas)
def test_replicas_survive_the_wire(replica: Replica):
    message = cluster_convert.replica_to_proto(replica)
    assert (
        cluster_convert.replica_from_proto(scheduler_pb2.Replica.FromString(message.SerializeToString()))
        == replica
    )


def _sent(report: RoundReport) -> RoundReport:
    message = cluster_convert.round_report_to_proto(report)
    return cluster_convert.round_report_from_proto(
        scheduler_pb2.RoundReport.FromString(message.SerializeToString())
    )


@given(reports)
def test_reports_survive_the_wire(report: RoundReport):
    assert _sent(report) == report


def test_every_field_of_a_report_is_sent():
    request = RequestSurvival(
        sequence_id="s",
        survival=(0.5,),
        verify_length=1,
        accepted=1,
        min_tokens_per_second=8.0,
        origin=DraftOrigin.LOOKUP,
        temperature=0.5,
    )
    report = RoundReport(
        replica_id="v",
        round=7,
        requests=(request,),
        batch_tokens=2,
        step_seconds=0.5,
        draft_seconds=0.25,
        context_tokens=9,
        loop_seconds=0.125,
        profile=(StepTime(requests=1, batch_tokens=1, context_tokens=2, seconds=0.5),),
        load=VerifierLoad(running_requests=3),
        kind=ReplicaKind(model="m", engine="e", hardware="h", dtype="d"),
        draft_compute_seconds=0.0625,
        drafter_id="d",
        drafter_primed=True,
        hidden_draft_seconds=0.03125,
        cohorts=2,
    )
    for record in (report, request):
        left = [one.name for one in dataclasses.fields(record) if getattr(record, one.name) == one.default]
        assert left == []
    assert _sent(report) == report


def test_plans_and_descriptions_survive_the_wire():
    plan = VerifyPlan(
        based_on_round=2**40,
        draft_token_capacity=17,
        draft_price=812.5,
        scalings=(
            ScalingBand(up_to_temperature=0.0, temperatures=(1.5,), biases=(-0.5,)),
            ScalingBand(up_to_temperature=math.inf),
        ),
    )
    assert cluster_convert.verify_plan_from_proto(cluster_convert.verify_plan_to_proto(plan)) == plan
    described = VerifierDescription(model="m", vocab_size=9, max_context_tokens=8, weights="w")
    message = convert.verifier_description_to_proto(described)
    assert convert.verifier_description_from_proto(message) == described


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"draft_price": float("nan")}, "draft_price must be a finite number >= 0, got nan"),
        ({"draft_price": float("inf")}, "draft_price must be a finite number >= 0, got inf"),
        ({"draft_price": -1.0}, "draft_price must be a finite number >= 0, got -1.0"),
        ({"curve": [{"batch_tokens": 1}]}, "curve must have step_seconds in [1e-07, 3600], got 0.0"),
        (
            {"curve": [{"batch_tokens": 1, "step_seconds": 3601}]},
            "curve must have step_seconds in [1e-07, 3600], got 3601.0",
        ),
        ({"curve": [{"step_seconds": 1}]}, "curve must have 1 <= requests <= batch_tokens, got 1 and 0"),
        ({"curve": [{"batch_tokens": 1, "step_seconds": 1}] * 2}, "curve must not name a point twice"),
    ],
)
def test_bad_plans_are_refused_by_field(fields: dict, told: str):
    with pytest.raises(InvalidRequestError) as caught:
        cluster_convert.verify_plan_from_proto(scheduler_pb2.VerifyPlan(**fields))
    assert (str(caught.value), caught.value.field) == (told, next(iter(fields)))


def test_absent_fields_mean_what_the_contract_says():
    request = convert.generate_request_from_proto(
        verifier_pb2.GenerateRequest(request_id="r", prompt_token_ids=[1])
    )
    assert request.max_tokens is None
    assert request.sampling == SamplingParams(temperature=0.0)
    assert request.speculation == SpeculationOptions()


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (common_pb2.SamplingParams(temperature=-1), "temperature"),
        (common_pb2.SamplingParams(temperature=float("nan")), "temperature"),
        (common_pb2.SamplingParams(top_p=0), "top_p"),
        (common_pb2.SamplingParams(min_p=1.5), "min_p"),
        (common_pb2.SamplingParams(seed=2**64 - 1), "seed"),
    ],
)
def test_bad_sampling_is_refused_by_field(message: common_pb2.SamplingParams, field: str):
    with pytest.raises(InvalidRequestError, match=field) as caught:
        convert.sampling_from_proto(message)
    assert caught.value.field == field


def test_unknown_enum_numbers_are_refused():
    with pytest.raises(InvalidRequestError, match=r"verification must be one of \[1, 2\], got 9"):
        convert.verification_from_proto(9)
    with pytest.raises(InvalidRequestError, match=r"^speculation\.verification must be") as caught:
        convert.speculation_from_proto(common_pb2.SpeculationOptions(verification=9))
    assert caught.value.field == "speculation.verification"
    with pytest.raises(InvalidRequestError, match="role"):
        cluster_convert.replica_from_proto(scheduler_pb2.Replica(replica_id="a", address="b", model="c"))


def _report(**fields) -> scheduler_pb2.RoundReport:
    return scheduler_pb2.RoundReport(**{"replica_id": "v", "round": 1, **fields})


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (_report(replica_id=""), "replica_id"),
        (_report(step_seconds=-1), "step_seconds"),
        (_report(draft_seconds=float("inf")), "draft_seconds"),
        (_report(draft_compute_seconds=float("nan")), "draft_compute_seconds"),
        (_report(hidden_draft_seconds=-1), "hidden_draft_seconds"),
        (_report(loop_seconds=-1), "loop_seconds"),
        (_report(cohorts=3), "cohorts"),
        (_report(requests=[scheduler_pb2.RequestSurvival(survival=[0.5, 0.6])]), "survival"),
        (_report(requests=[scheduler_pb2.RequestSurvival(survival=[1.5])]), "survival"),
        (_report(requests=[scheduler_pb2.RequestSurvival(temperature=-0.1)]), "temperature"),
        (_report(requests=[scheduler_pb2.RequestSurvival(temperature=float("nan"))]), "temperature"),
        (_report(requests=[scheduler_pb2.RequestSurvival(survival=[float("nan")])]), "survival"),
        (_report(requests=[scheduler_pb2.RequestSurvival(verify_length=1, accepted=2)]), "accepted"),
        (_report(profile=[scheduler_pb2.StepTime(batch_tokens=1)]), "profile"),
        (_report(profile=[scheduler_pb2.StepTime(step_seconds=1)]), "profile"),
    ],
)
def test_bad_reports_are_refused_by_field(message: scheduler_pb2.RoundReport, field: str):
    with pytest.raises(InvalidRequestError) as caught:
        cluster_convert.round_report_from_proto(message)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"step_seconds": 1e-8}, r"step_seconds must be 0 or in \[1e-07, 3600\], got 1e-08"),
        ({"step_seconds": 3601.0}, "step_seconds must be 0 or in .*, got 3601.0"),
        ({"draft_seconds": 1e300}, r"draft_seconds must be in \[0, 3600\], got 1e\+300"),
        ({"draft_compute_seconds": 1e9}, "draft_compute_seconds must be in .*, got 1000000000.0"),
        ({"hidden_draft_seconds": 1e9}, "hidden_draft_seconds must be in .*, got 1000000000.0"),
        ({"loop_seconds": 1e9}, "loop_seconds must be in .*, got 1000000000.0"),
        ({"profile": [{"batch_tokens": 1, "step_seconds": 1e308}]}, "profile must have step_seconds .*e.308"),
        ({"profile": [{"batch_tokens": 1, "step_seconds": 1e-9}]}, "profile must have step_seconds .*1e-09"),
    ],
)
def test_times_that_no_round_takes_are_refused(fields: dict, told: str):
    """Estimates from them would overflow or be zero."""
    with pytest.raises(InvalidRequestError, match=told):
        cluster_convert.round_report_from_proto(_report(**fields))


_POINT = scheduler_pb2.StepTime(batch_tokens=1, step_seconds=1)
_LONG = scheduler_pb2.RequestSurvival(survival=[0.5] * 256)
_TOO_LONG = scheduler_pb2.RequestSurvival(survival=[0.5] * 257)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            _report(requests=[scheduler_pb2.RequestSurvival()] * 16385),
            "requests must be at most 16384 ",
        ),
        (_report(requests=[_LONG] * 4097), "survival must be at most 1048576 values over all requests"),
        (_report(requests=[_LONG, _TOO_LONG]), "survival must be at most 256 values each, got 257"),
        (_report(profile=[_POINT] * 1025), "profile must be at most 1024 entries"),
        (_report(load={"new_request_ids": ["r"] * 4097}), "new_request_ids must be at most 4096 entries"),
        (_report(load={"speed_floors": [1.0] * 1025}), "speed_floors must be at most 1024 entries"),
    ],
)
def test_reports_that_would_take_long_to_read_are_refused(message: scheduler_pb2.RoundReport, told: str):
    with pytest.raises(InvalidRequestError, match=told):
        cluster_convert.round_report_from_proto(message)


def test_the_largest_rounds_that_a_verifier_can_have_are_read():
    message = _report(requests=[scheduler_pb2.RequestSurvival(survival=[0.5])] * MOST_RUNNING)
    assert len(cluster_convert.round_report_from_proto(message).requests) == MOST_RUNNING
