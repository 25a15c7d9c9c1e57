"""The compiled kernels as a Python object: ctypes mirrors of the C structures, and the calls."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dspark_core.errors import ConfigError
from dspark_core.kernels.build import KernelsUnavailableError, build_library, default_settings
from dspark_core.kernels.prebuilt import find_prebuilt

if TYPE_CHECKING:
    from ctypes import _CArgObject as CArgObject

_log = logging.getLogger(__name__)

ABI = 7
MAX_HEAD_DIM = 256


class Format(IntEnum):
    """Weight format of a packed matrix; `matrix.h` documents the layouts."""

    FLOAT32 = 0
    BFLOAT16 = 1
    Q4 = 2
    Q8 = 3
    I8 = 4
    """Q8's weights, with activations also rounded to 8 bits."""
    I4 = 5
    """Q4's weights, with activations also rounded to 8 bits."""


class MatrixStruct(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("bias", c_void_p),
        ("n", c_int32),
        ("k", c_int32),
        ("format", c_int32),
        ("paired", c_int32),
    )


class DecoderShapeStruct(ctypes.Structure):
    _fields_ = (
        ("layers", c_int32),
        ("hidden", c_int32),
        ("inner", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("vocab", c_int32),
        ("bfloat16", c_int32),
        ("eps", c_float),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("embedding", c_void_p),
        ("final_norm", c_void_p),
        ("head", MatrixStruct),
    )


class LayerStruct(ctypes.Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("attention_norm", c_void_p),
        ("qk_norm", c_void_p),
        ("qkv", MatrixStruct),
        ("output", MatrixStruct),
        ("gate_up", MatrixStruct),
        ("down", MatrixStruct),
    )


class BatchStruct(ctypes.Structure):
    _fields_ = (
        ("token_ids", c_void_p),
        ("runs", c_void_p),
        ("pages", c_void_p),
        ("logit_rows", c_void_p),
        ("taps", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("tapped", c_void_p),
        ("logits", c_void_p),
        ("tokens", c_int32),
        ("num_runs", c_int32),
        ("num_logit_rows", c_int32),
        ("num_taps", c_int32),
        ("num_pages", c_int32),
        ("page_tokens", c_int32),
        ("threads", c_int32),
        ("two_way", c_int32),
        ("slots", c_void_p),
        ("features", c_void_p),
    )


_SIGNATURES = {
    "dspark_abi": (c_int32, ()),
    "dspark_instructions": (c_char_p, ()),
    "dspark_byte_products": (c_int32, ()),
    "dspark_matrix_bytes": (c_int64, (POINTER(MatrixStruct),)),
    "dspark_pack": (None, (POINTER(MatrixStruct), c_void_p, c_int32, c_void_p)),
    "dspark_unpack": (None, (POINTER(MatrixStruct), c_int64, c_int64, c_void_p)),
    "dspark_linear": (
        None,
        (POINTER(MatrixStruct), c_void_p, c_int32, c_int32, c_void_p, c_int32, c_int32),
    ),
    "dspark_most_likely": (None, (c_void_p, c_int32, c_int32, c_void_p, c_int32)),
    "dspark_normed_linear": (
        None,
        (
            POINTER(MatrixStruct),
            c_void_p,
            c_int32,
            c_int32,
            c_void_p,
            c_void_p,
            c_float,
            c_void_p,
            c_int32,
        ),
    ),
    "dspark_decoder_create": (c_void_p, (POINTER(DecoderShapeStruct), POINTER(LayerStruct))),
    "dspark_decoder_destroy": (None, (c_void_p,)),
    "dspark_decoder_forward": (None, (c_void_p, POINTER(BatchStruct))),
    "dspark_text_create": (c_void_p, ()),
    "dspark_text_destroy": (None, (c_void_p,)),
    "dspark_cache_bytes": (c_int64, (c_int32,) * 6),
}


class Kernels:
    """The library's typed functions. Calls release the GIL."""

    def __init__(self, path: Path) -> None:
        """Raises KernelsUnavailableError if the file is not this project's library."""
        try:
            self.functions = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self.functions, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise KernelsUnavailableError(f"{path} cannot be loaded: {error}") from error
        if self.functions.dspark_abi() != ABI:
            raise KernelsUnavailableError(f"{path} has another interface")
        self.path = path

    @property
    def instructions(self) -> str:
        """The instruction set it was compiled for."""
        name: bytes = self.functions.dspark_instructions()
        return name.decode()

    @property
    def byte_products(self) -> bool:
        """Whether it has dedicated instructions for 8-bit integer products."""
        return bool(self.functions.dspark_byte_products())


@functools.cache
def struct_function(
    kernels: Kernels, name: str, struct: type[ctypes.Structure]
) -> Callable[[CArgObject], None]:
    """A function that takes a pointer to such a struct (`ctypes.byref`) and returns nothing."""
    function = getattr(kernels.functions, name)
    function.restype, function.argtypes = None, (POINTER(struct),)
    return cast("Callable[[CArgObject], None]", function)


@functools.cache
def load_kernels() -> Kernels:
    """Loads the kernels, compiling them if necessary; raises KernelsUnavailableError.

    If `DSPARK_PREBUILT_KERNELS` names a directory, nothing is compiled and the best library in it is used.
    With `DSPARK_AMX=off` the library does not use AMX.
    Raises ConfigError for a switch that is neither on nor off, as a slow start must not hide a typo.
    """
    _switched_on("DSPARK_AMX")  # only validated here; the library reads it itself
    wanted, prebuilt = _switched_on("DSPARK_KERNELS"), os.environ.get("DSPARK_PREBUILT_KERNELS")
    if prebuilt and wanted:
        return Kernels(find_prebuilt(Path(prebuilt)))
    return Kernels(build_library(default_settings()))


def _switched_on(name: str) -> bool:
    value = os.environ.get(name) or "on"
    if value not in ("on", "off"):
        raise ConfigError(f"{name} must be on or off, got {value!r}")
    return value == "on"


@functools.cache
def native_kernels() -> Kernels | None:
    """The kernels, or None after logging the reason once."""
    try:
        kernels = load_kernels()
    except KernelsUnavailableError as error:
        _log.warning("no native kernels, computing with PyTorch operators: %s", error)
        return None
    _log.info("native kernels: %s", kernels.instructions)
    return kernels


def kernels_for(logits: Tensor) -> Kernels | None:
    """The kernels if they support these rows: non-empty, float32, on a CPU."""
    if logits.device.type != "cpu" or logits.dtype is not torch.float32 or not len(logits):
        return None
    return native_kernels()
