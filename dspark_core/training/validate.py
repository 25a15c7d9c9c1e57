"""`python -m dspark_core.training.validate`: accepted length of a drafter at temperature 0.

Greedy speculative decoding commits exactly the target's greedy answer, whatever is drafted. Given that
answer and its features (shards of `dspark data features` over answers generated at temperature 0), the
rounds can be replayed without running the target: each round drafts a block at its anchor and accepts the
prefix that matches the answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.models.drafter_checkpoint import load_drafter
from dspark_core.models.dspark import DraftTokens, DSparkDrafter, greedy_sampler
from dspark_core.models.loading import load_target
from dspark_core.training.block_attention import packed_hidden
from dspark_core.training.features import FeatureSequence, list_sequences, read_sequence
from dspark_core.training.packing import pack
from dspark_core.zoo_paths import DEFAULT_DRAFTER, resolve_drafter_path


@dataclass(slots=True)
class Acceptance:
    """Counts over rounds; position k counts as proposed when every position before it was accepted."""

    block_size: int
    rounds: int = 0
    committed: int = 0
    proposed: list[int] = field(init=False)
    accepted: list[int] = field(init=False)
    predicted: list[float] = field(init=False)
    """Sums of the predicted confidences over the proposed positions."""

    def __post_init__(self) -> None:
        self.proposed, self.accepted = [0] * self.block_size, [0] * self.block_size
        self.predicted = [0.0] * self.block_size

    @property
    def accepted_length(self) -> float:
        """Committed tokens per round, the bonus token included."""
        return self.committed / self.rounds if self.rounds else 0.0

    def add(self, matches: Sequence[bool], confidences: Sequence[float] | None) -> int:
        """Count one round -> number of accepted draft tokens.

        `matches[k]`: whether draft token k equals the answer's; shorter than a block at the answer's end.
        """
        length = next((k for k, match in enumerate(matches) if not match), len(matches))
        for k in range(min(length + 1, len(matches))):
            self.proposed[k] += 1
            self.accepted[k] += matches[k]
            if confidences is not None:
                self.predicted[k] += confidences[k]
        return length

    def describe(self) -> str:
        lines = [
            f"accepted length {self.accepted_length:.3f} over {self.rounds} rounds, {self.committed} tokens"
        ]
        for k, (proposed, accepted, predicted) in enumerate(
            zip(self.proposed, self.accepted, self.predicted, strict=True), start=1
        ):
            if proposed:
                rates = f"accepted {accepted / proposed:.3f}  predicted {predicted / proposed:.3f}"
                lines.append(f"  position {k}: {rates}  ({proposed} proposed)")
        return "\n".join(lines)


@torch.inference_mode()
def replay_greedy_rounds(
    drafter: DSparkDrafter, sequences: Sequence[FeatureSequence], batch_size: int = 64
) -> Acceptance:
    """Replay every answer; the sequences of a batch take their rounds together."""
    total = Acceptance(drafter.config.block_size)
    for start in range(0, len(sequences), batch_size):
        _replay(drafter, sequences[start : start + batch_size], total)
    return total


def _replay(drafter: DSparkDrafter, sequences: Sequence[FeatureSequence], total: Acceptance) -> None:
    running = [(sequence, sequence.answer_start) for sequence in sequences]
    while running := [(sequence, anchor) for sequence, anchor in running if anchor < len(sequence) - 1]:
        anchors = torch.tensor([anchor for _, anchor in running])
        drafts = _draft([sequence for sequence, _ in running], anchors, drafter)
        confidences: list[list[float]] | None = None
        if drafts.confidence_logits is not None:
            confidences = torch.sigmoid(drafts.confidence_logits.float()).tolist()
        for row, (sequence, anchor) in enumerate(running):
            truth = sequence.token_ids[anchor + 1 : anchor + 1 + drafter.config.block_size]
            matches = (drafts.token_ids[row, : len(truth)] == truth).tolist()
            accepted = total.add(matches, confidences[row] if confidences else None)
            committed = min(accepted + 1, len(sequence) - 1 - anchor)
            total.rounds, total.committed = total.rounds + 1, total.committed + committed
            running[row] = (sequence, anchor + committed)


def _draft(sequences: Sequence[FeatureSequence], anchors: Tensor, drafter: DSparkDrafter) -> DraftTokens:
    config = drafter.config
    batch = pack(sequences, list(anchors[:, None]), config.block_size, config.context_window)
    hidden = packed_hidden(drafter, batch)
    return drafter.draw(batch.anchor_ids, hidden, greedy_sampler)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path, nargs="+", help="feature shards of greedy answers")
    parser.add_argument("--drafter", default=DEFAULT_DRAFTER, help="checkpoint directory or name")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="target: path or name")
    parser.add_argument("--limit", type=int, help="answers per shard; default: all")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = load_target(args.model, torch.bfloat16)
    embed, head = target.decoder.embed_tokens.weight, target.decoder.lm_head.weight
    path = resolve_drafter_path(args.drafter)
    drafter = load_drafter(path, embed, head, target.config, torch.bfloat16)
    for shard in args.shards:
        sequences = [read_sequence(ref) for ref in list_sequences(shard)[: args.limit]]
        print(f"{shard.stem}: {replay_greedy_rounds(drafter, sequences).describe()}", flush=True)


if __name__ == "__main__":
    main()
