"""Filled-in templates equal the JSON that the chunk's schema would have written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.openai.chunk_template import PLACE, ChunkTemplate
from services.gateway.openai.completion_answers import ChatChunkChoice, ChatCompletionChunk, ChatDelta


def chunk(text: str) -> ChatCompletionChunk:
    choice = ChatChunkChoice(index=0, delta=ChatDelta(content=text), logprobs=None, finish_reason=None)
    head = {"id": "chatcmpl-1", "created": 7, "model": 'a "quoted" model', "system_fingerprint": "fp"}
    return ChatCompletionChunk(**head, object="chat.completion.chunk", choices=[choice])


TEMPLATE = ChunkTemplate(chunk(PLACE))


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))))
def test_any_text_is_written_as_its_chunk_would_be(text: str) -> None:
    assert TEMPLATE.filled(text) == chunk(text).model_dump_json(exclude_unset=True)


@pytest.mark.parametrize("text", ["no place", PLACE * 2])
def test_a_chunk_without_a_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="needs a place"):
        ChunkTemplate(chunk(text))
