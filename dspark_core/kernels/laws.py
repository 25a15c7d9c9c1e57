"""Sampling parameters of target rows as the kernels take them (`law.h`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int32

from dspark_core.records import SamplingParams

_MOST = 2**31 - 1
"""Of what `top_k` holds; more than any vocabulary."""


class LawStruct(ctypes.Structure):
    _fields_ = (
        ("top_p", c_double),
        ("temperature", c_float),
        ("min_p", c_float),
        ("top_k", c_int32),
    )


def law_array(params: Sequence[SamplingParams]) -> ctypes.Array[LawStruct]:
    """One for each of `params`; keep it while its address is used."""
    return (LawStruct * len(params))(
        *[LawStruct(p.top_p, p.temperature, p.min_p, min(p.top_k, _MOST)) for p in params]
    )
