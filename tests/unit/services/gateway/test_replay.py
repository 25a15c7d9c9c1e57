from dspark_core.records import (
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    SamplingParams,
    SpeculationOptions,
    SpeculationStats,
    Verification,
)
from services.gateway.verifiers.replay import Replay

REQUEST = GenerateRequest(
    request_id="r",
    prompt_token_ids=(1, 2),
    max_tokens=5,
    stop_token_ids=(9,),
    sampling=SamplingParams(seed=4),
)


def stats(rounds: int) -> SpeculationStats:
    return SpeculationStats(rounds=rounds, committed_tokens=2 * rounds, draft_seconds=0.5 * rounds)


def test_the_first_verifier_gets_the_request_as_it_is() -> None:
    assert Replay(REQUEST, seed=7).request() == REQUEST


def test_the_next_verifier_continues_after_the_committed_tokens() -> None:
    replay = Replay(REQUEST, seed=7)
    replay.add(GenerateChunk(token_ids=(3, 4)))
    replay.add(GenerateChunk(token_ids=(5,)))
    continued = replay.request()
    assert continued.prompt_token_ids == (1, 2, 3, 4, 5)
    assert continued.max_tokens == 2
    assert continued.generated_tokens == 3  # penalties count them as output
    assert (continued.sampling, continued.stop_token_ids) == (REQUEST.sampling, REQUEST.stop_token_ids)


def test_every_attempt_is_told_from_the_one_before() -> None:
    """A verifier that is sent the request again may still be at work on it."""
    replay = Replay(REQUEST, seed=7)
    attempts = [replay.request().attempt, replay.request().attempt]
    replay.add(GenerateChunk(token_ids=(3,)))
    assert [*attempts, replay.request().attempt] == [0, 1, 2]


def test_a_request_is_bound_to_weights_by_its_first_token() -> None:
    replay = Replay(REQUEST, seed=7)
    replay.add(GenerateChunk(token_ids=(), weights="old"))
    assert (replay.weights, replay.request().weights) == ("", "")
    replay.add(GenerateChunk(token_ids=(3,), weights="new"))
    replay.add(GenerateChunk(token_ids=(4,)))
    assert (replay.weights, replay.request().weights) == ("new", "new")


def test_statistics_add_up_over_verifiers() -> None:
    replay = Replay(REQUEST, seed=7)
    replay.add(GenerateChunk(token_ids=(3,), stats=stats(1), cached_prompt_tokens=2))
    assert replay.add(GenerateChunk(token_ids=(4,), stats=stats(2))).stats == stats(2)
    replay.request()
    first = replay.add(GenerateChunk(token_ids=(5,), cached_prompt_tokens=4))
    assert (first.stats, first.cached_prompt_tokens) == (None, 2)
    assert replay.add(GenerateChunk(token_ids=(6,), stats=stats(3))).stats == stats(5)


def test_a_lost_last_chunk_is_made_up_for() -> None:
    stopped = Replay(REQUEST, seed=7)
    assert stopped.end() is None
    stopped.add(GenerateChunk(token_ids=(3, 9), stats=stats(1)))
    end = stopped.end()
    assert end is not None
    assert (end.token_ids, end.finish_reason, end.stats) == ((), FinishReason.STOP, stats(1))
    full = Replay(REQUEST, seed=7)
    full.add(GenerateChunk(token_ids=(3, 3, 3, 3)))
    assert full.end() is None
    full.add(GenerateChunk(token_ids=(3,)))
    end = full.end()
    assert end is not None
    assert end.finish_reason is FinishReason.LENGTH


def test_coupled_requests_keep_one_seed_over_all_verifiers() -> None:
    coupled = GenerateRequest(
        request_id="r",
        prompt_token_ids=(1,),
        speculation=SpeculationOptions(verification=Verification.COUPLED),
    )
    replay = Replay(coupled, seed=7)
    assert replay.request().sampling.seed == 7
    replay.add(GenerateChunk(token_ids=(3,)))
    assert replay.request().sampling.seed == 7
    assert replay.request().max_tokens is None
    assert Replay(REQUEST, seed=7).request().sampling.seed == 4
    plain = GenerateRequest(request_id="r", prompt_token_ids=(1,))
    assert Replay(plain, seed=7).request().sampling.seed is None
