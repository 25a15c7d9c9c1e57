"""Compares ways of storing a target's weights: how close outputs stay to float32, and how fast steps are.

    python -m benchmarks.weights [--choices stored stored-a8 full] [--prompts 24] [--threads 2]

Texts are the greedy answers of the same weights in float32. On these, each choice is scored by how often its
next token is the same, its mean KL divergence from float32 (nats per token) and its cross-entropy on the
answer (nats per token). Steps are timed interleaved, with a context of 200 positions per request; figures are
medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.engine_parts.steps import many_requests, measure_in_turns, median, one_request
from benchmarks.environment import describe_arguments, describe_machine
from dspark_core.engine.building import WEIGHTS, EngineOptions, build_target
from dspark_core.engine.target.batch import Run
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.evaluation.prompt_sets import read_prompt_set
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.tokenization.loading import load_tokenizer

KV_CACHE_BYTES = 256 * 2**20
CONTEXT = 200
SHAPES = (
    *one_request((1, 2, 3, 4, 6, 8), CONTEXT),
    *many_requests((4, 16), 1, CONTEXT),
    *many_requests((16,), 4, CONTEXT),
    *one_request((64,), CONTEXT),
)


@dataclass(frozen=True, slots=True)
class Closeness:
    tokens: int
    same_choice: float
    divergence_nats: float
    answer_nats: float


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    exact = _engine(arguments.target_model, "full", dtype="float32")
    engines = {choice: _engine(arguments.target_model, choice) for choice in arguments.choices}
    tokenizer = load_tokenizer(resolve_model_path(arguments.target_model))
    rows = read_prompt_set(arguments.prompts_file).rows[: arguments.prompts]
    prompts = [list(tokenizer.encode_chat(row.chat())) for row in rows]
    stops = set(tokenizer.stop_token_ids)
    texts = [(len(prompt), _greedy(exact, prompt, arguments.max_tokens, stops)) for prompt in prompts]
    closeness = {choice: _closeness(engine, exact, texts) for choice, engine in engines.items()}
    milliseconds = _timed(engines, arguments.repeats)
    _print_tables(closeness, milliseconds)
    document = {
        "benchmark": "weights",
        "arguments": describe_arguments(arguments),
        "environment": describe_machine(),
        "closeness": {choice: dataclasses.asdict(one) for choice, one in closeness.items()},
        "step_milliseconds": milliseconds,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


def _engine(target_model: str, weights: str, dtype: str = "bfloat16") -> TargetEngine:
    options = EngineOptions(
        target_model=target_model, drafter=None, dtype=dtype, weights=weights, kv_cache_bytes=KV_CACHE_BYTES
    )
    return build_target(options).engine


def _pages(engine: TargetEngine, positions: int) -> range:
    return range(1, 1 + -(-positions // engine.page_tokens))


def _greedy(engine: TargetEngine, prompt: list[int], max_tokens: int, stops: set[int]) -> list[int]:
    """-> the prompt followed by its answer."""
    pages, ids, start = _pages(engine, len(prompt) + max_tokens), list(prompt), 0
    while len(ids) < len(prompt) + max_tokens:
        logits = engine.forward([Run(ids[start:], start, pages, 1)])
        start = len(ids)
        ids.append(int(logits[0].argmax()))
        if ids[-1] in stops:
            break
    return ids


def _logits(engine: TargetEngine, ids: list[int], prompt_tokens: int) -> Tensor:
    """[answer tokens, vocabulary]: the logits that predict each answer token."""
    rows = len(ids) - prompt_tokens
    pages = _pages(engine, len(ids))
    return engine.forward([Run(ids[:-1], 0, pages, rows)]).float().clone()


def _closeness(
    engine: TargetEngine, exact: TargetEngine, texts: Sequence[tuple[int, list[int]]]
) -> Closeness:
    tokens, same, divergence, cost = 0, 0, 0.0, 0.0
    for prompt_tokens, ids in texts:
        reference = _logits(exact, ids, prompt_tokens).log_softmax(-1)
        mine = _logits(engine, ids, prompt_tokens).log_softmax(-1)
        answer = torch.tensor(ids[prompt_tokens:])
        tokens += len(answer)
        same += int((mine.argmax(-1) == reference.argmax(-1)).sum())
        divergence += float((reference.exp() * (reference - mine)).sum())
        cost -= float(mine.gather(-1, answer[:, None]).sum())
    return Closeness(tokens, same / tokens, divergence / tokens, cost / tokens)


def _timed(engines: dict[str, TargetEngine], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds by "requests x tokens" and choice."""
    seconds = measure_in_turns(engines, SHAPES, repeats=repeats)
    return {
        str(shape): {choice: 1e3 * median(times[shape]) for choice, times in seconds.items()}
        for shape in SHAPES
    }


def _print_tables(closeness: dict[str, Closeness], milliseconds: dict[str, dict[str, float]]) -> None:
    tokens = max(one.tokens for one in closeness.values())
    print(f"{'weights':12} same choice   KL, nats   answer, nats   ({tokens} tokens)")
    for choice, one in closeness.items():
        print(f"{choice:12} {one.same_choice:11.4f} {one.divergence_nats:10.5f} {one.answer_nats:14.5f}")
    print("\nms of a step" + "".join(f"{choice:>12}" for choice in closeness))
    for shape, by_choice in milliseconds.items():
        print(f"{shape:12}" + "".join(f"{by_choice[choice]:12.2f}" for choice in closeness))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target-model", default=DEFAULT_MODEL)
    parser.add_argument("--choices", nargs="+", default=["stored", "stored-a8", "full"], choices=WEIGHTS)
    parser.add_argument("--prompts", type=int, default=24, help="number of prompts")
    parser.add_argument("--prompts-file", type=Path, default=Path("loadtest/prompts.jsonl"))
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=30, help="repeats per step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/weights.json"))
    return parser


if __name__ == "__main__":
    main()
