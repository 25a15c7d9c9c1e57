"""Grammars of answers, made from a request's fields, as the parser follows them."""

from __future__ import annotations

import pytest
from llguidance import LLMatcher, LLTokenizer

from dspark_core.output_rules import MAX_GRAMMAR_CHARACTERS, Grammar
from dspark_core.tokenization.grammar_sources import grammar_source
from services.gateway.openai.grammar import StructuredOutputsBody
from tests.support.byte_tokenizer import END, byte_tokenizer

MODEL = byte_tokenizer()
TOKENS = LLTokenizer(MODEL.document, n_vocab=MODEL.vocab_size, eos_token=[END])


def accepts(grammar: Grammar, text: str) -> bool:
    matcher = LLMatcher(TOKENS, grammar_source(grammar), log_level=0)
    for token_id in MODEL.encode(text, add_special_tokens=False):
        matcher.compute_bitmask()
        if not matcher.try_consume_tokens([token_id]):
            return False
    assert not matcher.is_error(), matcher.get_error()
    return matcher.is_accepting()


@pytest.mark.parametrize("count", [3, 2000, 6000])
def test_an_answer_may_be_one_of_as_many_texts_as_a_grammar_has_room_for(count: int) -> None:
    texts = [f"{number}" for number in range(count)]
    grammar = StructuredOutputsBody(choice=texts).to_grammar()
    assert len(grammar.text) <= MAX_GRAMMAR_CHARACTERS
    assert accepts(grammar, texts[0])
    assert accepts(grammar, texts[-1])
    assert not accepts(grammar, "x")
    assert not accepts(grammar, f"{count}")


def test_a_choice_may_begin_another_and_have_any_characters() -> None:
    grammar = StructuredOutputsBody(choice=["yes", 'yes, é\n/"\\\u2028👻']).to_grammar()
    assert accepts(grammar, "yes")
    assert accepts(grammar, 'yes, é\n/"\\\u2028👻')
    assert not accepts(grammar, "yes, ")
