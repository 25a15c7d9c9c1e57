"""What only a real GPU can show. Run with: python -m pytest -m gpu tests/gpu"""

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())
