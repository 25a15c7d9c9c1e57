"""A fake CUDA device with tensors in CPU memory: computes real values and catches mistakes a CPU forgives.

Operators on tensors of two devices fail, as do those that would synchronise with the GPU (reading a value
back, data-dependent shapes), unless a test allows a number of reads. It reproduces neither a GPU's rounding
nor its timing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)


class OnGpu(Tensor):
    """A CPU tensor that claims to be on `cuda:0`, as does whatever is computed from it."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


READING = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "__contains__")
SHAPED_BY_VALUES = ("nonzero", "bincount", "masked_select", "unique", "argwhere", "equal", "allclose")


class ReadBackError(AssertionError):
    """The host waited for the GPU."""


class TwoDevicesError(AssertionError):
    """An operator got tensors on both the CPU and the GPU."""


@dataclass
class PretendCuda(TorchFunctionMode):
    reads_allowed: int = 0
    reads: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "pin_memory":
            return args[0]
        if name == "to" and isinstance(args[0], Tensor):
            moved = self._moved(func, args, kwargs)
            if moved is not None:
                return moved
        tensors = list(_tensors((args, kwargs)))
        on_gpu = [t for t in tensors if isinstance(t, OnGpu)]
        if on_gpu:
            self._check(name, args, kwargs, tensors)
            if name in READING:
                args = tuple(_plain(a) if isinstance(a, Tensor) else a for a in args)
        elif _is_cuda(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).as_subclass(OnGpu)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)

    def _moved(self, func, args, kwargs) -> Any:
        """`.to` with a device, as on a machine that has it; None: only the dtype changes."""
        values = [*args[1:], kwargs.get("device")]
        devices = [v for v in values if isinstance(v, (torch.device, str)) and v is not None]
        dtypes = [v for v in (*args[1:], kwargs.get("dtype")) if isinstance(v, torch.dtype)]
        if not devices:
            return None
        source = args[0]
        plain = _plain(source)
        plain = plain.to(dtypes[0]) if dtypes else plain
        if _is_cuda(devices[0]):
            same = isinstance(source, OnGpu) and not dtypes
            return source if same else plain.clone().as_subclass(OnGpu)
        if isinstance(source, OnGpu):
            self._read("to")
        return plain

    def _check(self, name, args, kwargs, tensors) -> None:
        if name in READING:
            self._read(name)
        if name in SHAPED_BY_VALUES or (name == "repeat_interleave" and "output_size" not in kwargs):
            raise ReadBackError(f"{name} of a tensor on the GPU: its shape depends on values")
        indexed = name in ("__setitem__", "__getitem__")
        if indexed and any(t.dtype is torch.bool for t in _tensors(args[1])):
            raise ReadBackError(f"{name} by a mask on the GPU: its shape depends on values")
        stray = [t for t in tensors if not isinstance(t, OnGpu) and t.dim() > 0]
        if stray and name not in ("__get__", "set_", "as_subclass"):
            raise TwoDevicesError(f"{name} of tensors on cuda:0 and cpu ({[tuple(t.shape) for t in stray]})")

    def _read(self, name: str) -> None:
        self.reads += 1
        if self.reads > self.reads_allowed:
            raise ReadBackError(
                f"{name} of a tensor on the GPU: read {self.reads} of {self.reads_allowed} allowed"
            )


@contextmanager
def pretend_cuda(reads_allowed: int = 0) -> Iterator[PretendCuda]:
    with PretendCuda(reads_allowed) as mode:
        yield mode


def on_gpu(value: Tensor) -> Tensor:
    return value.detach().clone().as_subclass(OnGpu)


def read(value: Tensor) -> Tensor:
    """The tensor's values for the test itself; not counted as a read."""
    return _plain(value)


def move_module(module: nn.Module) -> nn.Module:
    """Move all parameters and buffers; tied ones stay tied."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, value in table.items():
                if value is not None:
                    if id(value) not in moved:
                        moved[id(value)] = on_gpu(value)
                        if isinstance(value, nn.Parameter):
                            moved[id(value)] = nn.Parameter(moved[id(value)], requires_grad=False)
                    table[name] = moved[id(value)]
    return module


def _plain(value: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return value.as_subclass(Tensor)


def _is_cuda(device: object) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
