"""Looked-up draft blocks of many requests in one call; `algorithms.lookup_chain` is the reference."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import numpy as np
import numpy.typing as npt

from dspark_core.kernels.library import Kernels, struct_function


class _NgramTableStruct(ctypes.Structure):
    _fields_ = (
        ("checks", c_void_p),
        ("tokens", c_void_p),
        ("levels", c_void_p),
        ("rates", c_void_p),
        ("slots", c_int64),
        ("order", c_int32),
        ("padding", c_int32),
    )


class _LookupBlocksStruct(ctypes.Structure):
    _fields_ = (
        ("table", ctypes.POINTER(_NgramTableStruct)),
        ("texts", c_void_p),
        ("added", c_void_p),
        ("tokens", c_void_p),
        ("wanted", c_void_p),
        ("drafted", c_void_p),
        ("confidences", c_void_p),
        ("counts", c_void_p),
        ("blocks", c_int32),
        ("most", c_int32),
    )


Chain = tuple[tuple[int, ...], tuple[float, ...]]
"""Tokens and their confidences, as returned by `lookup_chain`."""


class NativeText:
    """A growing text indexed by the kernels."""

    def __init__(self, kernels: Kernels) -> None:
        functions = kernels.functions
        self.address: int = functions.dspark_text_create()
        self.known = 0
        """Number of tokens indexed so far."""
        self.free = weakref.finalize(self, functions.dspark_text_destroy, self.address)


class NativeLookup:
    """Blocks from texts and an n-gram table, computed by the kernels; not thread-safe."""

    def __init__(
        self,
        kernels: Kernels,
        *,
        order: int,
        checks: npt.NDArray[np.uint16],
        tokens: npt.NDArray[np.uint32],
        levels: npt.NDArray[np.uint8],
        rates: npt.NDArray[np.float32],
    ) -> None:
        """The parts of `algorithms.ngram_table.NgramTable` and its evidence."""
        self._call = struct_function(kernels, "dspark_lookup_blocks", _LookupBlocksStruct)
        self._arrays = tuple(np.ascontiguousarray(array) for array in (checks, tokens, levels, rates))
        self._table = _NgramTableStruct(*(a.ctypes.data for a in self._arrays), len(checks), order, 0)
        self._buffers = _Buffers(self._table, 1, 16, 64)

    def chains(
        self, texts: Sequence[NativeText], tokens: Sequence[Sequence[int]], wanted: Sequence[int]
    ) -> list[Chain]:
        """`lookup_chain` of each text with its longest match, up to `wanted` tokens each.

        `tokens`: all tokens of each text, which must extend those of the previous call.
        """
        added = [whole[text.known :] for text, whole in zip(texts, tokens, strict=True)]
        total = sum(map(len, added))
        count, most = len(texts), max(wanted, default=0)
        buffers = self._buffers
        if count > buffers.blocks or most > buffers.most or total > buffers.room:
            buffers = self._buffers = _Buffers(self._table, 2 * count, max(most, 16), 2 * total)
        width, at = buffers.most, 0
        for place, (text, new) in enumerate(zip(texts, added, strict=True)):
            buffers.texts[place] = text.address
            buffers.added[place] = len(new)
            buffers.tokens[at : at + len(new)] = list(new)
            text.known += len(new)
            at += len(new)
        buffers.wanted[:count] = list(wanted)
        buffers.record.blocks = count
        self._call(buffers.address)
        drafted, confidences = buffers.drafted, buffers.confidences
        return [
            (tuple(drafted[at : at + found]), tuple(confidences[at : at + found]))
            for at, found in zip(range(0, count * width, width), buffers.counts[:count], strict=True)
        ]


class _Buffers:
    """Input and output buffers, reused across calls: allocating them dominated calls in short rounds."""

    def __init__(self, table: _NgramTableStruct, blocks: int, most: int, room: int) -> None:
        self.blocks, self.most, self.room = blocks, most, room
        self.texts = (c_void_p * blocks)()
        self.added, self.wanted, self.counts = ((c_int32 * blocks)() for _ in range(3))
        self.tokens = (c_int32 * room)()
        self.drafted = (c_int32 * (blocks * most))()
        self.confidences = (c_float * (blocks * most))()
        parts = (self.texts, self.added, self.tokens, self.wanted)
        addresses = (ctypes.addressof(p) for p in (*parts, self.drafted, self.confidences, self.counts))
        self.record = _LookupBlocksStruct(ctypes.pointer(table), *addresses, 0, most)
        self.address = ctypes.byref(self.record)
