"""Grammars for tokenizers whose tokens are not quite the model's."""

from __future__ import annotations

from dspark_core.engine.grammars import GrammarCompiler, TokenizerDocument
from dspark_core.output_rules import Grammar, GrammarKind
from tests.support.tiny_tokenizer import END, tiny_tokenizer
from tests.unit.engine.test_grammars import asking


def test_tokens_beyond_the_targets_logits_are_left_out() -> None:
    """As of Gemma 3 1B, whose tokenizer has one more token than the model."""
    tokenizer = tiny_tokenizer()
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["x!y"])
    document = TokenizerDocument(tokenizer.to_str(), (END, size), size + 1)
    compiler = GrammarCompiler(lambda: document, size)
    grammar = Grammar(kind=GrammarKind.LARK, text=f'start: "aab" <[{size}]>? ("a" | "b")')
    known = compiler.compile(asking(grammar)[0], grammar).result()
    assert known.end_token_ids == (END,)
    for token_id in (forced := known.forced()):
        assert len(known.allowed()) == size
        assert known.take((token_id,)) == 1
    assert tokenizer.decode(forced) == "aab"
    only = Grammar(kind=GrammarKind.LARK, text=f'start: "aab" <[{size}]> "a"')
    assert tokenizer.decode(compiler.compile(asking(only)[0], only).result().forced()) == "aab"
