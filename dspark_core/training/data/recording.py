"""Records features while the target generates, since it computes every needed state anyway.

Recomputing them (`prefill`) takes another pass over prompt and answer, about as long as generating
the answer. Here only the LM head runs again, for the log-normalisers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_core.engine.sequence import SequenceState
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.errors import ConfigError
from dspark_core.models.decoder import Decoder
from dspark_core.training.data.prefill import log_normalizers
from dspark_core.training.features import FeatureSequence, write_shard
from dspark_core.training.manifest import (
    Manifest,
    ShardEntry,
    file_digest,
    read_manifest,
    shards_present,
    write_manifest,
)
from dspark_core.training.origin import FeatureOrigin


def recorded_layers(tap_layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Layers the engine must keep: the taps, and layer `num_layers`, the final state."""
    return (*tap_layers, num_layers)


class FeatureRecorder:
    """`on_end` callback of a generator whose engine keeps `recorded_layers`."""

    def __init__(self, engine: TargetEngine, decoder: Decoder) -> None:
        self._engine = engine
        self._decoder = decoder
        self._recorded: dict[str, FeatureSequence] = {}

    def __call__(self, sequence: SequenceState) -> None:
        prompt = len(sequence.request.prompt_token_ids)
        states = self._engine.read_features(sequence.pages, 0, len(sequence.tokens) - 1)
        # The last token was never run through the target; nothing is trained on its successor.
        states = F.pad(states, (0, 0, 0, 1))
        size = self._decoder.config.hidden_size
        taps, final = states[:, :-size], states[:, -size:]
        self._recorded[sequence.sequence_id] = FeatureSequence(
            token_ids=torch.tensor(sequence.tokens),
            answer_start=prompt,
            taps=taps.to("cpu", torch.bfloat16),
            final=final.to("cpu", torch.bfloat16),
            log_normalizers=self._normalizers(final, prompt).cpu(),
        )

    def take(self, keys: Sequence[str]) -> list[FeatureSequence]:
        """Remove and return the sequences recorded under the keys, in their order."""
        return [self._recorded.pop(key) for key in keys if key in self._recorded]

    @torch.inference_mode()
    def _normalizers(self, final: Tensor, prompt: int) -> Tensor:
        return log_normalizers(self._decoder, final, torch.arange(prompt - 1, len(final)))


class RecordedShards:
    """One shard per chunk of prompts, listed in the directory's manifest once it is complete."""

    def __init__(
        self, directory: Path, recorder: FeatureRecorder, origin: FeatureOrigin, settings: str, chunks: int
    ) -> None:
        """`settings`: digest of everything that determines the answers, used instead of the answer file's
        digest, which is not known yet. Raises ConfigError when the directory holds something else."""
        self._directory = directory
        self._recorder = recorder
        self._manifest = Manifest(origin=origin, answers_sha256=settings, planned_shards=chunks, shards={})
        directory.mkdir(parents=True, exist_ok=True)
        existing = read_manifest(directory)
        if existing is not None:
            self._manifest = replace(self._manifest, shards=shards_present(directory, existing))
            if (existing.origin, existing.answers_sha256) != (origin, settings):
                raise ConfigError(
                    f"--features {directory} holds those of other answers or layers: choose another"
                )
        elif any(directory.glob("*.safetensors")):
            raise ConfigError(
                f"--features {directory} holds shards without a manifest: choose another directory"
            )

    def has(self, chunk: int) -> bool:
        return _name(chunk) in self._manifest.shards

    def write(self, chunk: int, keys: Sequence[str]) -> None:
        """Write the recorded sequences of a chunk, in the order of the keys."""
        sequences = self._recorder.take(keys)
        if not sequences:
            return
        path = self._directory / _name(chunk)
        write_shard(path, sequences)
        entry = ShardEntry(
            sha256=file_digest(path),
            bytes=path.stat().st_size,
            sequences=len(sequences),
            tokens=sum(map(len, sequences)),
        )
        self._manifest = replace(self._manifest, shards={**self._manifest.shards, path.name: entry})
        write_manifest(self._directory, self._manifest)


def _name(chunk: int) -> str:
    return f"features-{chunk:06d}.safetensors"
