"""One block of memory for the rows that recorded passes of any size end in.

At most one of them runs at a time, and its rows are good until the next: logits of a large vocabulary
for every size would take as much memory as thousands of tokens of context.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SharedRows:
    """Asked for its largest size first it allocates once. Asked for more later, it starts anew: recordings
    write to the addresses they were made with, and hold them."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._rows = torch.empty((0, width), dtype=torch.float32, device=device)

    def first(self, count: int) -> Tensor:
        """[count, width] float32"""
        if len(self._rows) < count:
            self._rows = self._rows.new_empty((count, self._rows.shape[1]))
        return self._rows[:count]
