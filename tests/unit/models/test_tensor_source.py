"""What every source of weights checks, for any of them."""

import torch
from torch.profiler import ProfilerActivity, profile

from dspark_core.models.tensor_source import TensorSource, checked_finite


class Anywhere:
    """A source that is only asked what to call a tensor."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def describe(self, name: str) -> str:
        return name

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError("nothing is to be read")


SOURCE: TensorSource = Anywhere()


def test_looking_for_values_that_are_no_numbers_copies_no_tensor() -> None:
    """The largest of a model would take three times its memory for a while."""
    values = torch.zeros(2**22, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        assert checked_finite(SOURCE, "head", values) is values
    assert max(event.cpu_memory_usage for event in seen.events()) < values.nbytes
