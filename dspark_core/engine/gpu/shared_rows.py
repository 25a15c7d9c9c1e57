"""One memory block for the output rows of recorded passes of all sizes.

Only one pass runs at a time, and its rows are valid until the next. Separate logits for every size, with a
large vocabulary, would take as much memory as thousands of tokens of context.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SharedRows:
    """Request the largest size first, so that it allocates only once. A larger request later allocates a new
    block; earlier recordings keep writing to the old one, which they keep alive."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._rows = torch.empty((0, width), dtype=torch.float32, device=device)

    def first(self, count: int) -> Tensor:
        """The first `count` rows: [count, width] float32."""
        if len(self._rows) < count:
            self._rows = self._rows.new_empty((count, self._rows.shape[1]))
        return self._rows[:count]
