"""Sampling parameters of target rows in the kernels' form (`law.h`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int32

from dspark_core.records import SamplingParams

_MOST = 2**31 - 1
"""Maximum of `top_k`'s type; more than any vocabulary."""


class LawStruct(ctypes.Structure):
    _fields_ = (
        ("top_p", c_double),
        ("temperature", c_float),
        ("min_p", c_float),
        ("top_k", c_int32),
    )


def law_array(params: Sequence[SamplingParams]) -> ctypes.Array[LawStruct]:
    """One entry per element of `params`; must be kept alive while its address is in use."""
    return (LawStruct * len(params))(
        *[LawStruct(p.top_p, p.temperature, p.min_p, min(p.top_k, _MOST)) for p in params]
    )
