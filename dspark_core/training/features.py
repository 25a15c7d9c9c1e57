"""Target features on disk: what drafter training reads instead of running the target again.

A shard is one safetensors file holding whole sequences back to back. For every token it keeps the
tapped hidden states (the drafter's input), the final hidden state and the log-normaliser of the
full vocabulary (together the target distribution, d + 1 values instead of V).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.models.decoder import Decoder

_FIELDS = ("token_ids", "offsets", "answer_starts", "taps", "final", "log_normalizers")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Prompt and answer of one training example, in the target's tokens."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FeatureSequence:
    """One conversation with the target's view of it; row i belongs to token i."""

    token_ids: Tensor  # [tokens] int64
    answer_start: int
    """Index of the first answer token; only answers are trained on."""
    taps: Tensor  # [tokens, m * d]
    final: Tensor  # [tokens, d], after the final norm
    log_normalizers: Tensor  # [tokens] float32; defined from answer_start - 1 on

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class SequenceRef:
    """Where a sequence lies."""

    shard: Path
    start: int
    end: int
    answer_start: int


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Rows `{"prompt_ids": [...], "answer_ids": [...]}` of a JSONL file. Raises ConfigError."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                yield Conversation(tuple(row["prompt_ids"]), tuple(row["answer_ids"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}:{number}: not a conversation: {error!r}") from error


@torch.inference_mode()
def compute_features(decoder: Decoder, conversation: Conversation, layers: Sequence[int]) -> FeatureSequence:
    """Runs the target over one conversation."""
    token_ids = torch.tensor(conversation.prompt_ids + conversation.answer_ids)
    start = len(conversation.prompt_ids)
    output = decoder(token_ids, torch.arange(len(token_ids)), _attend_causally, layers)
    log_normalizers = torch.zeros(len(token_ids))
    log_normalizers[start - 1 :] = decoder.logits(output.hidden[start - 1 :]).float().logsumexp(dim=-1)
    return FeatureSequence(token_ids, start, output.taps, output.hidden, log_normalizers)


def write_shard(path: Path, sequences: Sequence[FeatureSequence]) -> None:
    """Appears under its name only once it is complete, so that training may read as shards come."""
    lengths = torch.tensor([0] + [len(sequence) for sequence in sequences])
    tensors = {
        "token_ids": torch.cat([sequence.token_ids for sequence in sequences]).int(),
        "offsets": lengths.cumsum(0),
        "answer_starts": torch.tensor([sequence.answer_start for sequence in sequences]).int(),
        "taps": torch.cat([sequence.taps for sequence in sequences]).to(torch.bfloat16),
        "final": torch.cat([sequence.final for sequence in sequences]).to(torch.bfloat16),
        "log_normalizers": torch.cat([sequence.log_normalizers for sequence in sequences]),
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.rename(path)


def write_shards(
    directory: Path, prefix: str, sequences: Iterable[FeatureSequence], shard_tokens: int
) -> int:
    """Fills shards of about `shard_tokens` tokens; returns how many were written."""
    directory.mkdir(parents=True, exist_ok=True)
    pending: list[FeatureSequence] = []
    written = 0
    for sequence in sequences:
        pending.append(sequence)
        if sum(map(len, pending)) >= shard_tokens:
            write_shard(directory / f"{prefix}{written:05d}.safetensors", pending)
            pending, written = [], written + 1
    if pending:
        write_shard(directory / f"{prefix}{written:05d}.safetensors", pending)
        written += 1
    return written


def list_sequences(shard: Path) -> list[SequenceRef]:
    """Raises CheckpointError when the file is no shard."""
    offsets = _read(shard, "offsets").tolist()
    answer_starts = _read(shard, "answer_starts").tolist()
    return [
        SequenceRef(shard, start, end, answer)
        for start, end, answer in zip(offsets[:-1], offsets[1:], answer_starts, strict=True)
    ]


def read_token_ids(shard: Path) -> Tensor:
    """All tokens of a shard, [tokens]; for counting."""
    return _read(shard, "token_ids").long()


def read_sequence(ref: SequenceRef) -> FeatureSequence:
    """Reads only this sequence's rows."""
    with safe_open(ref.shard, framework="pt") as file:
        rows = {
            name: file.get_slice(name)[ref.start : ref.end]
            for name in ("token_ids", "taps", "final", "log_normalizers")
        }
    return FeatureSequence(
        rows["token_ids"].long(), ref.answer_start, rows["taps"], rows["final"], rows["log_normalizers"]
    )


def _read(shard: Path, name: str) -> Tensor:
    try:
        with safe_open(shard, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard}: {name}: cannot be read: {error}") from error


def _attend_causally(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1)[None] for x in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, is_causal=True)
    return out[0].transpose(0, 1)
