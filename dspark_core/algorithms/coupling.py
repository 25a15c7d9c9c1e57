"""Coupled sampling: drafter and verifier draw with the same noise, so equal distributions give equal tokens.

The Gumbel-max trick: argmax over tokens of log p + g, with independent standard Gumbel g, is a draw
from p. Here g is a pure function of (seed, position, token id) rather than a stream of random numbers:
everyone who samples position t of a sequence sees the same noise, regardless of batching, of
which tokens are evaluated, and of whether drafts were involved.

It is evaluated as the equivalent exponential race, argmin of E / p with g = -log E, in float64:
one logarithm per token instead of three, and a token of probability zero never wins.

The hash is SplitMix64. A row's key is the finalizer applied to the seed and then to key + position,
each spread by a Weyl constant; a token's 64 bits are the finalizer of key + token id * Weyl. All of
it is wrapping int64 arithmetic and thus identical on every device; only the last bit of the
logarithm may differ. The top 52 bits make a uniform (m + 1/2) / 2^52, exact in float64, never 0 or 1.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dspark_core.algorithms import splitmix

_WEYL, _MIX_1, _MIX_2 = (constant - 2**64 for constant in (splitmix.WEYL, splitmix.MIX_1, splitmix.MIX_2))
"""As int64, which torch computes with."""
_BLOCK_ELEMENTS = 1 << 17
"""Elements processed together on a CPU: temporaries that fit its cache at least halve the time."""
_DEVICE_BLOCK_ELEMENTS = 1 << 24
"""The same on a GPU, where each temporary takes 128 MiB."""
_SPARSE = 8
"""Ratio of all tokens to possible tokens above which the possible ones are listed instead."""


def exponential_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Independent Exp(1) noise for each (seed, position, token id), float64 [rows, tokens].

    seeds, positions [rows] int64; token_ids [tokens] (the same for all rows) or [rows, tokens].
    `positions` are absolute: the index, in the whole sequence, of the token being drawn.
    """
    return _exponential(_row_keys(seeds, positions).unsqueeze(-1) + token_ids * _WEYL)


def sample_coupled_sparse(ids: Tensor, probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draws one of the listed tokens per row -> token ids [rows] int64.

    ids [rows, k] distinct within a row; probs [rows, k] non-negative, need not sum to 1 (a constant
    factor cannot change the draw); seeds, positions [rows] int64, as for `exponential_noise`.
    """
    race = exponential_noise(seeds, positions, ids) / probs
    return ids.gather(-1, race.argmin(dim=-1, keepdim=True)).squeeze(-1)


def sample_coupled(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draws one token per row -> [rows] int64, the same as evaluating all noise but cheaper.

    The smallest E / p wins, and E / p of the most likely token bounds what can still win, so only
    tokens whose hash could stay within that bound are evaluated.

    probs [rows, vocab] non-negative, need not sum to 1; seeds, positions [rows] int64.
    """
    rows, vocab = probs.shape
    block = max(1, (_DEVICE_BLOCK_ELEMENTS if probs.is_cuda else _BLOCK_ELEMENTS) // vocab)
    sample = sample_coupled_whole if probs.is_cuda else _sample_block
    spans = (slice(start, start + block) for start in range(0, rows, block))
    return torch.cat([sample(probs[s], seeds[s], positions[s]) for s in spans] or [seeds.new_empty(0)])


def sample_coupled_whole(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """`sample_coupled` by evaluating all noise: on a GPU, counting candidates would force a device sync."""
    keys = _row_keys(seeds, positions).unsqueeze(-1)
    return (_exponential(keys + _token_offsets(probs.shape[-1], probs.device)) / probs).argmin(dim=-1)


def _sample_block(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    rows, vocab = probs.shape
    keys = _row_keys(seeds, positions)
    possible = probs > 0
    if rows * vocab > _SPARSE * int(possible.sum()):  # few possible tokens: evaluate them directly
        row, token = possible.nonzero(as_tuple=True)
    else:
        best, likeliest = probs.max(dim=-1)
        bound = _exponential(keys + likeliest * _WEYL) / best  # the winner's race time is at most this
        row, token = _contenders(probs, keys, bound).nonzero(as_tuple=True)
    race = _exponential(keys[row] + token * _WEYL) / probs[row, token]
    least = race.new_full((rows,), torch.inf).scatter_reduce_(0, row, race, "amin")
    # Ties go to the lowest token id, as in argmin.
    winners = torch.where(race <= least[row], token, vocab)
    return torch.full_like(seeds, vocab - 1).scatter_reduce_(0, row, winners, "amin")


def _contenders(probs: Tensor, keys: Tensor, bound: Tensor) -> Tensor:
    """A superset of the tokens with E / p <= bound, as a mask [rows, vocab].

    E = -log u is at least 1 - u, which the hash gives without a logarithm: its top bits are
    those of u, and the finalizer's last step does not change the top 31 of them.
    """
    x = keys.unsqueeze(-1) + _token_offsets(probs.shape[-1], probs.device)
    x = x.bitwise_xor_(_shift_right(x, 30)).mul_(_MIX_1)
    x = x.bitwise_xor_(_shift_right(x, 27)).mul_(_MIX_2)
    top = _shift_right(x, 33).float()  # floor(2^31 u), to 24 bits
    # Rounding errs on the safe side: at most 64 in `top`, 128 below, and 1e-5 relative in the bound.
    least = probs * (bound * (-(1.0 + 1e-5) * 2.0**31)).float().unsqueeze(-1)
    return top >= least.add_(2.0**31 - 512)


@functools.lru_cache(maxsize=4)
def _token_offsets(vocab: int, device: torch.device) -> Tensor:
    return torch.arange(vocab, device=device) * _WEYL


def _exponential(words: Tensor) -> Tensor:
    """Hashed token keys, before the finalizer -> Exp(1) noise, float64."""
    uniform = (_shift_right(_mix(words), 12).double() + 0.5) * 2.0**-52
    return uniform.log_().neg_()


def _row_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    return _mix(_mix(seeds + _WEYL) + (positions + 1) * _WEYL)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer: a bijection of 64-bit words; every input bit affects every output bit."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own shift extends the sign of an int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
