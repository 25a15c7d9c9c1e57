"""OpenAI's seeds are signed, those of verifiers are not."""

import pytest

from dspark_core.errors import InvalidRequestError
from dspark_core.records import SamplingParams
from services.gateway.openai.schema import ChatCompletionBody, CompletionBody


@pytest.mark.parametrize(
    ("asked", "seed"),
    [(None, None), (0, 0), (7, 7), (2**63 - 1, 2**63 - 1), (-1, 2**63 - 1), (-2, 2**63 - 2), (-(2**63), 0)],
)
def test_each_seed_of_64_bits_is_one_that_verifiers_take(asked: int | None, seed: int | None) -> None:
    user = [{"role": "user", "content": "hi"}]
    bodies = (
        CompletionBody.model_validate({"model": "m", "prompt": "p", "seed": asked}),
        ChatCompletionBody.model_validate({"model": "m", "messages": user, "seed": asked}),
    )
    for body in bodies:
        request = body.to_request("id")
        assert request.seed == seed
        SamplingParams(seed=request.seed)  # raises for an invalid seed


@pytest.mark.parametrize("asked", [2**63, -(2**63) - 1])
def test_larger_ones_are_refused_as_they_were_sent(asked: int) -> None:
    body = CompletionBody.model_validate({"model": "m", "prompt": "p", "seed": asked})
    with pytest.raises(InvalidRequestError, match=rf"in \[-{2**63}, {2**63 - 1}\], got {asked}$"):
        body.to_request("id")
