"""`python -m dspark_core.training.train`: trains a drafter on feature shards and exports it.

The output folder holds `checkpoints/` (resume by running the same command again) and, whenever a
checkpoint is written, `drafter/` in the format `load_drafter` reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.models.config import DrafterConfig, MarkovHeadType
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.models.loading import LoadedTarget, load_target
from dspark_core.training.allocator import keep_freed_memory
from dspark_core.training.checkpoints import Checkpoints
from dspark_core.training.initial import choose_draft_vocab, new_drafter
from dspark_core.training.objectives.dspark import DSparkObjective
from dspark_core.training.recipe import LossConfig
from dspark_core.training.sources import CachedSource
from dspark_core.training.trainer import StepReport, Trainer
from dspark_core.training.trainer_config import TrainerConfig

VOCAB_FILE, LOG_FILE = "draft_vocab.pt", "log.jsonl"


def main() -> None:
    args = _arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    shards = sorted(args.data.glob("*.safetensors"))
    target = load_target(args.model, torch.bfloat16, pack=False)
    source = CachedSource(shards, tap_layers=args.layers)
    drafter = _new_drafter(args, target, source)
    config = TrainerConfig(
        steps=args.steps,
        sequences_per_step=args.sequences,
        learning_rate=args.learning_rate,
        matrix_learning_rate=args.matrix_learning_rate,
        warmup_fraction=args.warmup,
        decay_fraction=args.decay,
        seed=args.seed,
    )
    losses = LossConfig(
        anchors_per_sequence=args.anchors,
        cross_entropy_weight=args.cross_entropy_weight,
        distance_weight=args.distance_weight,
        loss_decay=args.loss_decay,
        sample_below=args.sample_below,
        tap_dropout=args.dropout,
    )
    trainer = Trainer(DSparkObjective(drafter, losses), config, source)
    checkpoints = Checkpoints(args.out / "checkpoints", keep=2)
    latest = checkpoints.latest()
    if latest is not None:
        trainer.restore(checkpoints.load(latest))
    print(
        f"{len(source)} sequences, from step {trainer.step} to {args.steps}",
        flush=True,
    )
    _train(trainer, checkpoints, args)


def _train(trainer: Trainer, checkpoints: Checkpoints, args: argparse.Namespace) -> None:
    log = ProgressLog(args.out / LOG_FILE, args.log_every)
    for report in trainer.run():
        log.add(report)
        if report.step % args.save_every == 0 or report.step == args.steps:
            checkpoints.save(trainer.step, trainer.state())
            trainer.export(args.out / "drafter")


class ProgressLog:
    """Prints and keeps means over every `every` steps."""

    def __init__(self, path: Path, every: int) -> None:
        self._path = path
        self._every = every
        self._pending: list[StepReport] = []
        self._started = time.perf_counter()

    def add(self, report: StepReport) -> None:
        self._pending.append(report)
        if len(self._pending) < self._every:
            return
        row = self._row()
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._pending, self._started = [], time.perf_counter()

    def _row(self) -> dict[str, object]:
        count, last = len(self._pending), self._pending[-1]
        rates = torch.tensor([report.acceptance for report in self._pending]).mean(dim=0)
        mean = dataclasses.replace(last, acceptance=tuple(rates.tolist()))
        return {
            "step": last.step,
            "ce": round(sum(r.cross_entropy for r in self._pending) / count, 4),
            "l1": round(sum(r.distance for r in self._pending) / count, 4),
            "confidence": round(sum(r.confidence for r in self._pending) / count, 4),
            "acceptance": [round(rate, 3) for rate in mean.acceptance],
            "expected_length": round(mean.expected_length, 3),
            "gradient_norm": round(sum(r.gradient_norm for r in self._pending) / count, 3),
            "learning_rate": f"{last.learning_rate:.2e}",
            "seconds_per_step": round((time.perf_counter() - self._started) / count, 2),
        }


def _new_drafter(args: argparse.Namespace, target: LoadedTarget, source: CachedSource) -> DSparkDrafter:
    backbone = dataclasses.replace(target.config, num_layers=args.draft_layers)
    config = DrafterConfig(
        backbone=backbone,
        num_target_layers=target.config.num_layers,
        target_layer_ids=tuple(args.layers),
        block_size=args.block_size,
        mask_token_id=args.mask_token,
        markov_rank=args.markov_rank,
        markov_head_type=MarkovHeadType(args.markov_head),
        confidence_head=True,
        confidence_head_with_markov=args.markov_rank > 0,
        context_window=args.window,
        draft_vocab_size=args.draft_vocab,
    )
    return new_drafter(config, target.decoder, _vocab(args, target, source), args.source_layers)


def _vocab(args: argparse.Namespace, target: LoadedTarget, source: CachedSource) -> Tensor | None:
    """Chosen once per run: shards that come later must not change what the weights mean."""
    if args.draft_vocab is None:
        return None
    path = args.out / VOCAB_FILE
    if not path.exists():
        ids = choose_draft_vocab(
            source.token_counts(target.config.vocab_size), args.draft_vocab, args.always_tokens
        )
        torch.save(ids, path)
    ids = torch.load(path, weights_only=True)
    assert isinstance(ids, Tensor)
    return ids


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory of feature shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="target: path or name")
    drafter = parser.add_argument_group("drafter")
    drafter.add_argument("--layers", type=int, nargs="+", default=[1, 8, 14, 21, 27], help="tapped layers")
    drafter.add_argument("--draft-layers", type=int, default=2)
    drafter.add_argument(
        "--source-layers", type=int, nargs="*", default=[], help="target layers to start from"
    )
    drafter.add_argument("--block-size", type=int, default=7)
    drafter.add_argument("--mask-token", type=int, default=16)
    drafter.add_argument("--markov-rank", type=int, default=64)
    drafter.add_argument("--markov-head", choices=[kind.value for kind in MarkovHeadType], default="vanilla")
    drafter.add_argument("--window", type=int, default=128)
    drafter.add_argument("--draft-vocab", type=int, default=8192)
    drafter.add_argument(
        "--always-tokens", type=int, nargs="*", default=[0, 1, 2], help="kept whatever their count"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, required=True)
    training.add_argument("--sequences", type=int, default=8, help="per step")
    training.add_argument("--anchors", type=int, default=48, help="per sequence")
    training.add_argument("--learning-rate", type=float, default=6e-4)
    training.add_argument("--matrix-learning-rate", type=float, help="optimise inner matrices with Muon")
    training.add_argument("--warmup", type=float, default=0.04, help="fraction of the steps")
    training.add_argument("--decay", type=float, default=0.96, help="fraction of the steps")
    training.add_argument("--cross-entropy-weight", type=float, default=0.1)
    training.add_argument("--distance-weight", type=float, default=0.9)
    training.add_argument(
        "--loss-decay", type=float, default=4.0, help="block positions over which weight falls to 1/e"
    )
    training.add_argument("--sample-below", type=float, default=0.0, help="draw positions of less weight")
    training.add_argument("--dropout", type=float, default=0.0)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--threads", type=int, default=1)
    training.add_argument("--log-every", type=int, default=20)
    training.add_argument("--save-every", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    main()
