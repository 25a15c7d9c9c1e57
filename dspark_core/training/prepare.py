"""`python -m dspark_core.training.prepare`: conversations (JSONL of token ids) to feature shards."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.models.loading import LoadedTarget, load_target
from dspark_core.training.features import FeatureSequence, compute_features, read_conversations, write_shards


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    target = load_target(args.model, torch.bfloat16)
    sequences = _features(target, args.data, tuple(args.layers))
    shards = write_shards(args.out, args.data.stem + "-", sequences, args.shard_tokens)
    print(f"{shards} shards in {args.out}")


def _features(target: LoadedTarget, data: Path, layers: tuple[int, ...]) -> Iterator[FeatureSequence]:
    tokens = 0
    for number, conversation in enumerate(read_conversations(data), start=1):
        sequence = compute_features(target.decoder, conversation, layers)
        tokens += len(sequence)
        if number % 100 == 0:
            print(f"{number} conversations, {tokens} tokens", flush=True)
        yield sequence


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with prompt_ids and answer_ids")
    parser.add_argument("--out", type=Path, required=True, help="directory of the shards")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="target: path or name")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 8, 14, 21, 27], help="tapped layers")
    parser.add_argument("--shard-tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
