"""Runs the target over whole conversations, many in one pass without padding.

Linear layers process all tokens of a pass together; attention runs per conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_core.errors import ConfigError
from dspark_core.models.decoder import Decoder
from dspark_core.training.data.conversations import Conversation
from dspark_core.training.features import FeatureSequence

_HEAD_ROWS = 256
"""Rows whose vocabulary-sized logits exist at a time."""
_CACHED_ROWS = 8
"""Rows normalised at a time on a CPU, so that their float32 logits stay in cache."""


@torch.no_grad()
def compute_packed(
    decoder: Decoder, conversations: Sequence[Conversation], layers: Sequence[int]
) -> list[FeatureSequence]:
    """Runs one pass over all conversations. Raises ConfigError for a token outside the vocabulary."""
    device = decoder.embed_tokens.weight.device
    rows = [torch.tensor(one.prompt_ids + one.answer_ids) for one in conversations]
    lengths = [len(row) for row in rows]
    token_ids = torch.cat(rows)
    _check_tokens(token_ids, decoder.config.vocab_size)
    positions = torch.cat([torch.arange(length) for length in lengths])
    kinds = [decoder.config.attention_kind(layer) for layer in range(decoder.config.num_cached_layers)]
    attend = PackedCausalAttention(lengths, [kind.window for kind in kinds])
    output = decoder(token_ids.to(device), positions.to(device), attend, layers)
    normalizers = log_normalizers(decoder, output.hidden, _answer_rows(conversations).to(device))
    parts = zip(
        conversations,
        rows,
        torch.split(output.taps, lengths),
        torch.split(output.hidden, lengths),
        torch.split(normalizers, lengths),
        strict=True,
    )
    return [
        # Clones, because a view of one sequence would keep the whole pass in memory.
        FeatureSequence(row, len(one.prompt_ids), taps.cpu().clone(), final.cpu().clone(), logs.cpu().clone())
        for one, row, taps, final, logs in parts
    ]


def plan_packs(lengths: Sequence[int], pack_tokens: int) -> Iterator[list[int]]:
    """Groups of consecutive indices whose lengths sum to at most `pack_tokens`; longer ones go alone."""
    pack: list[int] = []
    tokens = 0
    for index, length in enumerate(lengths):
        if pack and tokens + length > pack_tokens:
            yield pack
            pack, tokens = [], 0
        pack.append(index)
        tokens += length
    if pack:
        yield pack


class PackedCausalAttention:
    """`Attend` over whole sequences stored back to back; nothing is cached."""

    def __init__(self, lengths: Sequence[int], windows: Sequence[int | None]) -> None:
        """`windows` per layer: number of positions a token sees, its own included; None: no limit."""
        self._lengths = list(lengths)
        self._windows = windows

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [tokens, heads, head_dim]; k, v [tokens, kv_heads, head_dim] -> like q."""
        window = self._windows[layer]
        parts = (torch.split(x.transpose(0, 1), self._lengths, dim=1) for x in (q, k, v))
        out = [self._attend(*rows, window=window) for rows in zip(*parts, strict=True)]
        return torch.cat(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
        grouped, length = q.shape[0] != k.shape[0], q.shape[1]
        visible = None
        if window is not None and window < length:
            everything = torch.ones(length, length, dtype=torch.bool, device=q.device)
            visible = everything.tril().triu(1 - window)
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], visible, is_causal=visible is None, enable_gqa=grouped
        )
        return out[0].transpose(0, 1)


def _answer_rows(conversations: Sequence[Conversation]) -> Tensor:
    """Flattened rows that predict an answer token, plus each last row: from each prompt's last token on."""
    rows, start = [], 0
    for one in conversations:
        rows.append(torch.arange(start + len(one.prompt_ids) - 1, start + len(one)))
        start += len(one)
    return torch.cat(rows)


def log_normalizers(decoder: Decoder, hidden: Tensor, rows: Tensor) -> Tensor:
    """Log-normalisers of `rows`, zero elsewhere, [tokens] float32."""
    out = torch.zeros(len(hidden), device=hidden.device)
    at_once = _HEAD_ROWS if hidden.is_cuda else _CACHED_ROWS
    for some in torch.split(rows, _HEAD_ROWS):
        parts = torch.split(decoder.logits(hidden[some]), at_once)
        out[some] = torch.cat([_log_sum_exp(part.float()) for part in parts])
    return out


def _log_sum_exp(logits: Tensor) -> Tensor:
    """[rows, vocab] -> [rows]; `log_softmax` is one fused pass, ten times as fast as `logsumexp` here."""
    return logits[:, 0] - F.log_softmax(logits, dim=-1)[:, 0]


def _check_tokens(token_ids: Tensor, vocab_size: int) -> None:
    highest = int(token_ids.max())
    if highest >= vocab_size:
        raise ConfigError(
            f"token id {highest} is outside the target's vocabulary of {vocab_size}: "
            "the answers are of another target"
        )
