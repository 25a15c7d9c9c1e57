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

import functools

import torch
from torch import Tensor

_WEYL = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_BLOCK_ELEMENTS = 1 << 17
"""Tokens looked at together on a CPU: temporaries that stay in its cache at least halve the time."""
_DEVICE_BLOCK_ELEMENTS = 1 << 24
"""The same on a GPU: each of the temporaries takes 128 MiB."""
_SPARSE = 8
"""From this many impossible tokens for a possible one on, the possible ones are listed."""


def exponential_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Independent Exp(1) noise of each (seed, position, token id), float64 [rows, tokens].

    seeds, positions [rows] int64; token_ids [tokens] (the same for all rows) or [rows, tokens].
    `positions` are absolute: the index, in the whole sequence, of the token being drawn.
    """
    return _exponential(_row_keys(seeds, positions).unsqueeze(-1) + token_ids * _WEYL)


def sample_coupled_sparse(ids: Tensor, probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draws one of the listed tokens of each row -> token ids [rows] int64.

    ids [rows, k] distinct within a row; probs [rows, k] non-negative, need not sum to 1 (a constant
    factor cannot change the draw); seeds, positions [rows] int64, as for `exponential_noise`.
    """
    race = exponential_noise(seeds, positions, ids) / probs
    return ids.gather(-1, race.argmin(dim=-1, keepdim=True)).squeeze(-1)


def sample_coupled(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draws a token of each row -> [rows] int64: what evaluating all noise would, for less.

    The race is won by the least E / p, and E of the likeliest token bounds what may still win: of
    the others only those whose hash promises no more than that bound are evaluated at all.

    probs [rows, vocab] non-negative, need not sum to 1; seeds, positions [rows] int64.
    """
    rows, vocab = probs.shape
    block = max(1, (_DEVICE_BLOCK_ELEMENTS if probs.is_cuda else _BLOCK_ELEMENTS) // vocab)
    sample = sample_coupled_whole if probs.is_cuda else _sample_block
    spans = (slice(start, start + block) for start in range(0, rows, block))
    return torch.cat([sample(probs[s], seeds[s], positions[s]) for s in spans] or [seeds.new_empty(0)])


def sample_coupled_whole(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """As `sample_coupled`, by evaluating all noise: for a GPU, which need not be asked how much matters."""
    keys = _row_keys(seeds, positions).unsqueeze(-1)
    return (_exponential(keys + _token_offsets(probs.shape[-1], probs.device)) / probs).argmin(dim=-1)


def _sample_block(probs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    rows, vocab = probs.shape
    keys = _row_keys(seeds, positions)
    possible = probs > 0
    if rows * vocab > _SPARSE * int(possible.sum()):  # looking at each is dearer than evaluating few
        row, token = possible.nonzero(as_tuple=True)
    else:
        best, likeliest = probs.max(dim=-1)
        bound = _exponential(keys + likeliest * _WEYL) / best  # somebody wins with no more than this
        row, token = _contenders(probs, keys, bound).nonzero(as_tuple=True)
    race = _exponential(keys[row] + token * _WEYL) / probs[row, token]
    least = race.new_full((rows,), torch.inf).scatter_reduce_(0, row, race, "amin")
    # Of equal ones the lowest token id, as argmin has it.
    winners = torch.where(race <= least[row], token, vocab)
    return torch.full_like(seeds, vocab - 1).scatter_reduce_(0, row, winners, "amin")


def _contenders(probs: Tensor, keys: Tensor, bound: Tensor) -> Tensor:
    """Which tokens may have E / p <= bound [rows, vocab], some that have not included.

    E = -log u is at least 1 - u, which the hash gives without a logarithm: its highest bits are
    those of u, and the finalizer's last step leaves the top 31 of them alone.
    """
    x = keys.unsqueeze(-1) + _token_offsets(probs.shape[-1], probs.device)
    x = x.bitwise_xor_(_shift_right(x, 30)).mul_(_MIX_1)
    x = x.bitwise_xor_(_shift_right(x, 27)).mul_(_MIX_2)
    top = _shift_right(x, 33).float()  # floor(2^31 u), to 24 bits
    # Rounding is on the safe side: at most 64 in `top`, 128 below, and relatively 1e-5 in the bound.
    least = probs * (bound * (-(1.0 + 1e-5) * 2.0**31)).float().unsqueeze(-1)
    return top >= least.add_(2.0**31 - 512)


@functools.lru_cache(maxsize=4)
def _token_offsets(vocab: int, device: torch.device) -> Tensor:
    return torch.arange(vocab, device=device) * _WEYL


def _exponential(words: Tensor) -> Tensor:
    """Hashed keys of tokens before the finalizer -> Exp(1) noise, float64."""
    uniform = (_shift_right(_mix(words), 12).double() + 0.5) * 2.0**-52
    return uniform.log_().neg_()


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
