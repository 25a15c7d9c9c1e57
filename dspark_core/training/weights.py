"""Float32 master weights that the optimiser updates, and the module's weights that follow them.

With one worker, masters are plain copies. With several, masters, optimiser state and average are sharded
(FSDP2): every worker keeps the whole module in the compute dtype only, reduces the gradients into its
shard of the masters, and gathers the updated shards of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dspark_core.models.layers import ComputedRotary


class Weights(Protocol):
    @property
    def masters(self) -> Sequence[nn.Parameter]:
        """In the order of the module's parameters."""
        ...

    def collect_gradients(self) -> None:
        """Move the module's gradients, summed over workers, to the masters."""
        ...

    def publish(self) -> None:
        """Copy the masters' values into the module."""
        ...

    def whole(self, part: Tensor) -> Tensor:
        """Gather a tensor that is sharded like a master. Collective: every worker must call it."""
        ...

    def part(self, whole: Tensor, master: nn.Parameter) -> Tensor:
        """Inverse of `whole`: this worker's shard."""
        ...


class LocalWeights:
    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Casts the float32 module to `dtype` in place."""
        self._module = module
        self.masters = [nn.Parameter(p.detach().clone().float()) for p in module.parameters()]
        _cast(module, dtype)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        for master, parameter in zip(self.masters, self._module.parameters(), strict=True):
            master.grad = _taken_gradient(parameter)

    @torch.no_grad()
    def publish(self) -> None:
        for master, parameter in zip(self.masters, self._module.parameters(), strict=True):
            parameter.copy_(master)

    def whole(self, part: Tensor) -> Tensor:
        return part

    def part(self, whole: Tensor, master: nn.Parameter) -> Tensor:
        return whole.to(master.device)


class ShardedWeights:
    """Needs an initialised process group; every worker starts from the same module."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self._module = module
        store = nn.ParameterList([nn.Parameter(p.detach().clone().float()) for p in module.parameters()])
        device = store[0].device.type
        self._mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        self._sharded = fully_shard(store, mesh=self._mesh, mp_policy=policy, reshard_after_forward=False)
        self._store = store  # same object as _sharded, typed as the list it still is
        self.masters = list(store.parameters())
        _cast(module, dtype)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        from torch.distributed.tensor import DTensor, Partial

        for master, parameter in zip(self.masters, self._module.parameters(), strict=True):
            summed = DTensor.from_local(_taken_gradient(parameter), self._mesh, [Partial()])
            assert isinstance(master, DTensor)
            master.grad = summed.redistribute(placements=master.placements)

    @torch.no_grad()
    def publish(self) -> None:
        self._sharded.unshard()
        for gathered, parameter in zip(self._store.parameters(), self._module.parameters(), strict=True):
            parameter.copy_(gathered)
        self._sharded.reshard()

    def whole(self, part: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return part.full_tensor() if isinstance(part, DTensor) else part

    def part(self, whole: Tensor, master: nn.Parameter) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(master, DTensor)
        return distribute_tensor(whole.to(master.device), self._mesh, master.placements)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast everything but rotary frequencies: positions would multiply their rounding error, and inference
    computes them in float32."""
    frequencies = {m: m.frequencies for m in module.modules() if isinstance(m, ComputedRotary)}
    module.to(dtype)
    for rotary, values in frequencies.items():
        rotary.frequencies = values


def _taken_gradient(parameter: nn.Parameter) -> Tensor:
    """Take the gradient off the parameter, in float32; zeros where the objective did not use it."""
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient.float()
