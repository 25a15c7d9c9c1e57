"""Coupled sampling: drafter and verifier draw with the same noise, so equal laws give equal tokens.

The Gumbel-max trick: argmax over tokens of log p + g, with independent standard Gumbel g, is a draw
from p. Here g is a pure function of (seed, position, token id), never a stream of random numbers:
whoever samples position t of a sequence sees the same noise, however rows are batched, whichever
tokens are looked at, and whether or not drafts were involved.

It is evaluated as the equivalent exponential race, argmin of E / p with g = -log E, in float64:
one logarithm a token instead of three, and a probability of zero simply never wins.

The hash is SplitMix64. A row's key is the finalizer applied to the seed and then to key + position,
each spread by a Weyl constant; a token's 64 bits are the finalizer of key + token id * Weyl. All of
it is wrapping int64 arithmetic and therefore the same on every device; only the logarithm's last
bit may not be. The top 52 bits make a uniform (m + 1/2) / 2^52, exact in float64, never 0 or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WEYL = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_NARROW = 64
"""Rows with fewer possible tokens than this (top-k, small top-p) evaluate noise for those only."""
_BLOCK_ELEMENTS = 1 << 17
"""Noise evaluated at a time on a CPU: temporaries that stay in its cache at least halve the time."""


def exponential_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Independent Exp(1) noise of each (seed, position, token id), float64 [rows, tokens].

    seeds, positions [rows] int64; token_ids [tokens] (the same for all rows) or [rows, tokens].
    `positions` are absolute: the index, in the whole sequence, of the token being drawn.
    """
    bits = _mix(_row_keys(seeds, positions).unsqueeze(-1) + token_ids * _WEYL)
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return uniform.log_().neg_()


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """The same noise as standard Gumbel variables, -log of `exponential_noise`."""
    return -exponential_noise(seeds, positions, token_ids).log()


def sample_coupled_sparse(ids: Tensor, probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draws one of the listed tokens of each row -> token ids [rows] int64.

    ids [rows, k] distinct within a row; probs [rows, k] non-negative, need not sum to 1 (a constant
    factor cannot change the draw); seeds, positions [rows] int64, as for `exponential_noise`.
    """
    race = exponential_noise(seeds, positions, ids) / probs
    return ids.gather(-1, race.argmin(dim=-1, keepdim=True)).squeeze(-1)


def sample_coupled(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draws a token of each row -> [rows] int64: what evaluating all noise would, often for less.

    probs [rows, vocab] non-negative, need not sum to 1; seeds, positions [rows] int64.
    """
    vocab = probs.shape[-1]
    if vocab <= _NARROW:
        return _sample_dense(probs, seeds, positions)
    likely = probs.topk(_NARROW, dim=-1)
    tokens = sample_coupled_sparse(likely.indices, likely.values, seeds, positions)
    wide = (likely.values[:, -1] > 0).nonzero().squeeze(-1)
    if len(wide):
        tokens[wide] = _sample_dense(probs[wide], seeds[wide], positions[wide])
    return tokens


def _sample_dense(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    rows, vocab = probs.shape
    token_ids = torch.arange(vocab, device=probs.device)
    block = rows if probs.is_cuda else max(1, _BLOCK_ELEMENTS // vocab)
    tokens = seeds.new_empty(rows)
    for start in range(0, rows, block):
        span = slice(start, start + block)
        race = exponential_noise(seeds[span], positions[span], token_ids) / probs[span]
        tokens[span] = race.argmin(dim=-1)
    return tokens


def _row_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    return _mix(_mix(seeds + _WEYL) + (positions + 1) * _WEYL)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer: a bijection of 64-bit words in which every input bit stirs all."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own copies the sign of an int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
