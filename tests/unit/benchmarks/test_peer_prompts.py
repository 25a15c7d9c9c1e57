"""Engines of the comparison have the same work to do, and are timed by when it is done."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from benchmarks.peers import questions
from benchmarks.peers_parts.contract import Trial


def test_no_prompt_is_asked_twice() -> None:
    asked = list(itertools.islice(questions(("why", "how"), lambda text: tuple(text.encode())), 40))
    assert len({prompt[:2] for prompt in asked[:9]}) == 9
    assert len(set(asked)) == 40
    assert all(prompt.endswith((b"why", b"how")) for prompt in map(bytes, asked))


@pytest.mark.parametrize("prompt_lookup", [False, True])
def test_a_first_token_is_there_after_the_first_pass(
    prompt_lookup: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    from benchmarks.peers_parts import transformers_peer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    passes: list[None] = []
    model.register_forward_hook(lambda *_: passes.append(None))
    monkeypatch.setattr(transformers_peer, "as_transformers", lambda *_: model)
    monkeypatch.setattr(transformers_peer, "time", SimpleNamespace(perf_counter=lambda: 1.0 + len(passes)))
    peer = transformers_peer.TransformersPeer("tiny", torch.float32, prompt_lookup=prompt_lookup)
    outcome = peer.run(Trial(prompts=((5, 6, 7, 5, 6, 7, 5, 6),), max_tokens=6, users=1))
    assert outcome.first_token_seconds == (1.0,)
    assert outcome.answer_seconds == (float(len(passes)),)
    assert len(outcome.tokens[0]) == 6
