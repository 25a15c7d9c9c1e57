"""Tokens per second of the data stage: `python -m benchmarks.data_stage --threads 1`.

Prints rates per second of wall-clock time and of CPU time; on a busy machine, the latter are more reliable.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator

import torch

from dspark_core.engine.building import EngineOptions, build_target
from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.records import SamplingParams
from dspark_core.training.data.conversations import Conversation
from dspark_core.training.data.generation import BatchGenerator, Generated, Job
from dspark_core.training.data.prefill import compute_packed, plan_packs
from dspark_core.training.origin import default_tap_layers

PROMPT_TOKENS, ANSWER_TOKENS = 80, 120
PREFILLED = 24
PACKS = (1, 512, 2048)
CONCURRENCIES = (1, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target-model", default=DEFAULT_MODEL)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--answer-tokens", type=int, default=32, help="tokens generated per sequence (default: 32)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = EngineOptions(target_model=arguments.target_model, drafter=None, kv_cache_bytes=2**30)
    built = build_target(options)
    layers = default_tap_layers(built.loaded.config.num_layers)
    drawn = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(drawn.randrange(built.loaded.config.vocab_size) for _ in range(count))

    conversations = [Conversation(ids(PROMPT_TOKENS), ids(ANSWER_TOKENS)) for _ in range(PREFILLED)]
    for pack_tokens in PACKS:
        for pack in plan_packs([len(one) for one in conversations[:2]], pack_tokens):
            compute_packed(built.loaded.decoder, [conversations[index] for index in pack], layers)

        def prefill(pack_tokens: int = pack_tokens) -> int:
            for pack in plan_packs([len(one) for one in conversations], pack_tokens):
                compute_packed(built.loaded.decoder, [conversations[index] for index in pack], layers)
            return sum(map(len, conversations))

        _report(f"features, {max(1, pack_tokens // len(conversations[0]))} conversations a pass", prefill)
    for concurrency in CONCURRENCIES:
        generator = BatchGenerator(built.engine, (), concurrency=concurrency)
        prompts = [ids(PROMPT_TOKENS) for _ in range(max(2, concurrency))]

        def generate(generator: BatchGenerator = generator, prompts: list[tuple[int, ...]] = prompts) -> int:
            results = generator.run(_jobs(prompts, arguments.answer_tokens))
            return sum(len(one.token_ids) for one in results if isinstance(one, Generated))

        _report(f"answers, {concurrency} at once (prompts of {PROMPT_TOKENS} tokens included)", generate)


def _jobs(prompts: list[tuple[int, ...]], max_tokens: int) -> Iterator[Job]:
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=(0.0, 0.7)[number % 2], top_p=0.95, seed=number)
        yield Job(key=str(number), prompt_ids=prompt, sampling=sampling, max_tokens=max_tokens)


def _report(name: str, work: Callable[[], int]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{name}: {tokens / wall:.0f} tokens/s, {tokens / cpu:.0f} per CPU second", flush=True)


if __name__ == "__main__":
    main()
