"""Sequential heads of a DSpark drafter (paper, section 3): Markov heads and the confidence head.

A Markov head turns the token before a block position into a bias on that position's base logits;
its three kinds differ only in the low-rank vector that is projected to the vocabulary.
Drawing tokens is left to the drafter and its sampler.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_core.models.config import DrafterConfig, MarkovHeadType


class MarkovHead(nn.Module):
    """`B(x_{k-1}, .) = W1[x_{k-1}] W2`: the vanilla head, and the base of the other two.

    W1 is indexed by target token ids; W2 has one row per draft vocabulary entry.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.rank = config.markov_rank
        self.markov_w1 = nn.Embedding(config.backbone.vocab_size, self.rank)
        self.markov_w2 = nn.Linear(self.rank, config.output_size, bias=False)

    def embed(self, previous_ids: Tensor) -> Tensor:
        """previous_ids [...] -> W1 rows [..., rank]."""
        rows: Tensor = self.markov_w1(previous_ids)
        return rows

    def initial_state(self, rows: int) -> Tensor:
        """Initial state s_0 = 0, [rows, rank]."""
        return self.markov_w1.weight.new_zeros((rows, self.rank))

    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One position: embedded [rows, rank], hidden [rows, d] -> bias [rows, Vd], next state."""
        latent, state = self.latent(embedded, hidden, state)
        bias: Tensor = self.markov_w2(latent)
        return bias, state

    def block_latents(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """The vectors that `markov_w2` projects to the vocabulary, [rows, block, rank]."""
        state = self.initial_state(len(embedded))
        latents = []
        for position in range(embedded.shape[1]):
            latent, state = self.latent(embedded[:, position], hidden[:, position], state)
            latents.append(latent)
        return torch.stack(latents, dim=1)

    def latent(self, embedded: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The low-rank vector behind one position's bias [rows, rank], and the next state."""
        return embedded, state


class GatedMarkovHead(MarkovHead):
    """`W2( sigmoid(gate_proj [h_k ; W1[x]]) * W1[x] )`: the hidden state can suppress the bias."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.gate_proj = nn.Linear(config.backbone.hidden_size + self.rank, self.rank)

    def latent(self, embedded: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(self.gate_proj(torch.cat((hidden, embedded), dim=-1)))
        return gate * embedded, state


class RnnMarkovHead(MarkovHead):
    """A gated recurrence over the block, so that each bias depends on all tokens drawn so far."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.joint_proj = nn.Linear(2 * self.rank + config.backbone.hidden_size, 3 * self.rank)

    def latent(self, embedded: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        joint = self.joint_proj(torch.cat((state, embedded, hidden), dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        state = gate * state + (1 - gate) * torch.tanh(candidate)
        return torch.tanh(output), state


class ConfidenceHead(nn.Module):
    """Logit of the probability that position k is accepted, given that all before it were."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        extra = config.markov_rank if config.confidence_head_with_markov else 0
        self.with_markov = config.confidence_head_with_markov
        self.proj = nn.Linear(config.backbone.hidden_size + extra, 1)

    def forward(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        """hidden [..., d], embedded [..., rank] (the Markov rows) -> logits [...]."""
        inputs = hidden
        if self.with_markov:
            assert embedded is not None, "configuration ties this head to a Markov head"
            inputs = torch.cat((hidden, embedded), dim=-1)
        logits: Tensor = self.proj(inputs)
        return logits.squeeze(-1)

    def flat_weights(self) -> Tensor:
        """[d + 1] or [d + rank + 1] float32: the weights, then the bias."""
        weight, bias = self.proj.weight, self.proj.bias
        return torch.cat((weight.detach().flatten(), bias.detach())).float()


def build_markov_head(config: DrafterConfig) -> MarkovHead | None:
    """The configured head; None for DFlash (`markov_rank == 0`)."""
    if config.markov_rank == 0:
        return None
    kinds = {
        MarkovHeadType.VANILLA: MarkovHead,
        MarkovHeadType.GATED: GatedMarkovHead,
        MarkovHeadType.RNN: RnnMarkovHead,
    }
    return kinds[config.markov_head_type](config)
