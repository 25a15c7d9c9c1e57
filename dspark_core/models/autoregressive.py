"""Common base of Eagle3 and MTP-1 drafters: the target's embedding and LM head, and the step from the single
layer's output to tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dspark_core.models.config import AutoregressiveConfig
from dspark_core.models.layers import RMSNorm, soft_cap
from dspark_core.models.packing import PackedLinear, pack_linears, pack_weight


class AutoregressiveDrafter(nn.Module):
    """Embedding and LM head are frozen buffers, shared with the target's where possible."""

    config: AutoregressiveConfig
    embed_tokens: Tensor
    lm_head: Tensor
    draft_vocab_ids: Tensor | None
    norm: RMSNorm
    """Before the LM head. Created by the subclass, to keep the order of its parameters."""

    def __init__(
        self,
        config: AutoregressiveConfig,
        embed_tokens: Tensor,
        lm_head: Tensor,
        draft_vocab_ids: Tensor | None,
    ) -> None:
        """embed_tokens [vocab, d]; lm_head [draft vocab, d]; draft_vocab_ids [draft vocab] int64."""
        super().__init__()
        self.config = config
        self.register_buffer("embed_tokens", embed_tokens, persistent=False)
        self.register_buffer("lm_head", lm_head, persistent=False)
        self.register_buffer("draft_vocab_ids", draft_vocab_ids)
        self._packed_head: PackedLinear | None = None

    def pack(self) -> None:
        """Speeds up inference on a CPU; the linear layers' weights are no longer parameters afterwards."""
        pack_linears(self)
        self._packed_head = pack_weight(self.lm_head)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [tokens, d], the layer's output -> [tokens, draft vocab]."""
        normed, cap = self.norm(hidden), self.config.backbone.final_logit_softcap
        if self._packed_head is not None:
            return soft_cap(self._packed_head(normed), cap)
        return soft_cap(F.linear(normed, self.lm_head), cap)

    def target_ids(self, draft_indices: Tensor) -> Tensor:
        """Draft vocabulary indices -> target token ids."""
        return draft_indices if self.draft_vocab_ids is None else self.draft_vocab_ids[draft_indices]
