"""How drafts fare: by token a request is followed exactly, by round as far as a trace tells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.record_domains import Answer
from benchmarks.record_domains import recorded as recorded_answer
from dspark_core.algorithms.ngram_table import empty_table
from dspark_core.engine.tracing.trace_format import TracedRequest, TraceHeader, encode
from dspark_core.errors import ConfigError
from dspark_core.evaluation.runner import EvalPrompt
from dspark_core.simulation.domains import (
    DEFAULTS,
    RecordedRequest,
    domain_of_trace,
    domains_document,
    read_domains,
    stack_domains,
    uncensored,
)
from dspark_core.simulation.trace_reader import read_trace
from tests.unit.simulation.worlds import traced

BY_TOKEN = RecordedRequest(
    survival=((0.9, 0.5), (0.8,), (), (0.4, 0.1)),
    accepted=(2, 1, 0, 0),
    looked_up=((), (0.75, 0.5, 0.25), (), (0.5,)),
    looked_up_accepted=(0, 3, 0, 1),
    by_token=True,
)


def test_a_request_by_token_is_followed_from_where_each_round_ends() -> None:
    rows = stack_domains({"x": [BY_TOKEN]})
    # Whole blocks: tokens 1 to 3 at once, then the fourth alone. One at most: two, one, one.
    assert rows.accepted_length("x") == pytest.approx((3 + 1) / 2)
    assert rows.accepted_length("x", 1) == pytest.approx((2 + 1 + 1) / 3)
    assert rows.accepted_length("x", 0) == 1.0
    assert rows.answer_tokens().tolist() == [5]
    assert (rows.block_size, rows.longest) == (2, 3)


def test_a_request_by_round_is_followed_round_by_round() -> None:
    traced = RecordedRequest(
        survival=((0.9, 0.5), (), (0.8,)),
        accepted=(2, 0, 1),
        looked_up=((), (0.7, 0.6, 0.5), ()),
        looked_up_accepted=(0, 3, 0),
    )
    rows = stack_domains({"x": [traced]})
    assert rows.accepted_length("x") == pytest.approx(1 + 3 / 3)
    assert rows.answer_tokens().tolist() == [1 + (1 + 2) + (1 + 3) + (1 + 1)]


def test_domains_survive_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(domains_document({"x": [BY_TOKEN]}, {})))
    assert read_domains(path) == {"x": (BY_TOKEN,)}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"accepted": None}, r"domain 'x'"),
        ({"accepted": [2, 1, 0]}, r"domain 'x': survival has 4 rows, accepted 3"),
        ({"accepted": [2, 2, 0, 0]}, r"accepted must be in \[0, draft length\]"),
        ({"looked_up_accepted": [0, 4, 0, 1]}, r"looked_up_accepted must be in \[0, draft length\]"),
        ({"looked_up": [[0.5]], "looked_up_accepted": [1]}, r"looked_up has 1 rows, survival 4"),
    ],
)
def test_a_wrong_file_of_domains_says_where(
    tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    document = domains_document({"x": [BY_TOKEN]}, {})
    document["domains"]["x"][0].update(change)  # type: ignore[index]
    path = tmp_path / "d.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=complaint):
        read_domains(path)


def test_a_file_of_another_format_is_refused_by_both_names(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('{"format": "dspark-domains-1", "domains": {}}')
    with pytest.raises(ConfigError, match=r"d\.json must be .*'dspark-domains-2', got 'dspark-domains-1'"):
        read_domains(path)


def test_the_shipped_domains_order_as_they_were_measured() -> None:
    shipped = stack_domains(read_domains(DEFAULTS))
    lengths = {name: shipped.accepted_length(name) for name in shipped.names}
    assert set(lengths) == {"chat", "code", "math"}
    assert all(1.3 < length < 3.0 for length in lengths.values())
    assert lengths["math"] > lengths["chat"]
    assert shipped.accepted_length("math", 0) == 1.0
    assert shipped.looked_up_accepted.mean() > 0.1


def test_what_is_recorded_of_an_answer_is_what_each_draft_would_have_brought() -> None:
    prompt = EvalPrompt(set_name="x", row=0, token_ids=(1, 2, 3, 4))
    answered = Answer(
        prompt,
        token_ids=[1, 2, 3, 5, 6],
        drafts=[((2, 3), (0.9, 0.5)), ((3, 4), (0.8, 0.8)), ((9,), (0.7,)), ((6,), (0.6,))],
    )
    found = recorded_answer(answered, empty_table(), max_tokens=4)
    assert [pytest.approx(row) for row in found.survival] == [(0.9, 0.45), (0.8, 0.64), (0.7,)]
    assert found.accepted == (2, 1, 0)
    # Behind 1 and behind 1 2 the prompt's own text goes on 2 3 4 1 ... and 3 4 1 2 ...: two and one stand.
    assert found.looked_up_accepted == (2, 1, 0)
    assert [bool(row) for row in found.looked_up] == [True, True, True]


@given(st.data())
def test_what_was_not_seen_is_drawn_between_the_bounds(data: st.DataObject) -> None:
    survival, product = [], 1.0
    for one in data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=7)):
        product *= one
        survival.append(product)
    verified = data.draw(st.integers(0, len(survival)))
    accepted = data.draw(st.integers(0, verified))
    drawn = uncensored(survival, verified, accepted, np.random.default_rng(0))
    if accepted < verified:
        assert drawn == accepted
    else:
        assert verified <= drawn <= len(survival)


def test_unseen_tokens_stand_as_often_as_survival_says() -> None:
    rng = np.random.default_rng(1)
    drawn = [uncensored((0.8, 0.4, 0.2), 1, 1, rng) for _ in range(4000)]
    assert np.mean([value >= 2 for value in drawn]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([value >= 3 for value in drawn]) == pytest.approx(0.25, abs=0.03)


def asked(
    name: str, survival: tuple[float, ...], verified: int, accepted: int, looked_up: bool = False
) -> TracedRequest:
    return TracedRequest(
        sequence_id=name,
        survival=survival,
        planned=verified,
        verified=verified,
        accepted=accepted,
        min_tokens_per_second=0.0,
        looked_up=looked_up,
    )


def test_a_trace_becomes_a_domain_request_by_request(tmp_path: Path) -> None:
    rounds = [
        (asked("a", (0.9, 0.8, 0.4), 2, 1), asked("b", (0.5, 0.1, 0.1), 1, 0)),
        (asked("a", (0.7, 0.6), 2, 2, looked_up=True), asked("b", (), 0, 0)),
    ]
    path = tmp_path / "t.jsonl"
    lines = [traced(number, *requests) for number, requests in enumerate(rounds)]
    header = TraceHeader(replica_id="v", model="tiny", sample=1.0)
    path.write_bytes(b"".join([encode(header), *[encode(line) for line in lines]]))
    first, second = domain_of_trace(read_trace([path]))
    assert (first.survival, first.accepted) == (((0.9, 0.8, 0.4), ()), (1, 0))
    assert (first.looked_up, first.looked_up_accepted) == (((), (0.7, 0.6)), (0, 2))
    assert (second.survival, second.accepted) == (((0.5, 0.1, 0.1),), (0,))
    assert not first.by_token
