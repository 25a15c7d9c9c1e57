"""The golden fixtures, and the plainest possible speculative decoding to hold against them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_core.models.decoder import DecoderOutput
from dspark_core.models.drafter_checkpoint import load_drafter
from dspark_core.models.dspark import DSparkDrafter, greedy_sampler
from dspark_core.models.loading import LoadedTarget, load_target

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
STOP_TOKEN = 1
NEW_TOKENS = 24


@cache
def golden(drafter: str) -> dict:
    return json.loads((GOLDEN / "golden.json").read_text())[drafter]


@cache
def golden_target() -> LoadedTarget:
    return load_target(str(GOLDEN / "qwen3_tiny_target"), torch.float32, pack=False)


@cache
def golden_drafter(name: str) -> DSparkDrafter:
    target = golden_target()
    embed, head = target.decoder.embed_tokens.weight, target.decoder.lm_head.weight
    return load_drafter(GOLDEN / name, embed, head, target.config, torch.float32)


def attend_densely(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q [queries, heads, d], k and v [keys, kv_heads, d], visible [queries, keys] bool."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=visible)
    return out.transpose(0, 1)


@torch.inference_mode()
def run_target(token_ids: list[int], tap_layers: tuple[int, ...]) -> DecoderOutput:
    size = len(token_ids)
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    return golden_target().decoder(
        torch.tensor(token_ids),
        torch.arange(size),
        lambda layer, q, k, v: attend_densely(q, k, v, causal),
        tap_layers,
    )


class OneBlock:
    """`Attend` of one block over its whole context, bidirectional inside the block."""

    def __init__(self, context: list[tuple[Tensor, Tensor]]) -> None:
        self._context = context

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._context[layer]
        k, v = torch.cat((keys, k)), torch.cat((values, v))
        return attend_densely(q, k, v, torch.ones(len(q), len(k), dtype=torch.bool))


@torch.inference_mode()
def draft_hidden(drafter: DSparkDrafter, tokens: list[int], anchor: int) -> Tensor:
    """Hidden states [1, block, d] of the block at position `anchor`, context recomputed."""
    taps = run_target(tokens, drafter.config.target_layer_ids).taps[:anchor]
    window = drafter.config.context_window
    first = 0 if window is None else max(0, anchor - window)
    positions = torch.arange(first, anchor)
    context = drafter.context_keys_values(drafter.project(taps[first:]), positions)
    return drafter.block_hidden(torch.tensor([tokens[anchor]]), torch.tensor([anchor]), OneBlock(context))


@dataclass(frozen=True)
class Round:
    candidates: list[int]
    confidence_logits: list[float] | None
    accepted: int
    next_token: int


@torch.inference_mode()
def decode_greedily(drafter: DSparkDrafter, prompt: list[int]) -> tuple[list[int], list[Round]]:
    """Speculative decoding without any cache: output (prompt included) and every round."""
    decoder = golden_target().decoder
    tokens = [*prompt, int(decoder.logits(run_target(prompt, ()).hidden[-1:]).argmax())]
    limit, rounds = len(prompt) + NEW_TOKENS, []
    while len(tokens) <= limit and STOP_TOKEN not in tokens[len(prompt) :]:
        anchor = len(tokens) - 1
        block = drafter.draw(torch.tensor(tokens[-1:]), draft_hidden(drafter, tokens, anchor), greedy_sampler)
        drafted = block.token_ids[0].tolist()
        truth = decoder.logits(run_target(tokens + drafted, ()).hidden[anchor:]).argmax(-1).tolist()
        accepted = next((i for i, token in enumerate(drafted) if token != truth[i]), len(drafted))
        confidence = None if block.confidence_logits is None else block.confidence_logits[0].tolist()
        rounds.append(Round([tokens[-1], *drafted], confidence, accepted, truth[accepted]))
        tokens += [*drafted[:accepted], truth[accepted]]
    return tokens[:limit], rounds
