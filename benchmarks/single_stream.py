"""Tokens per second of one stream: with speculation, with the drafter alone, with lookup alone, with the
request's own text alone, without speculation, and with `transformers` on the same weights.

    python -m benchmarks.single_stream [--prompts FILE.jsonl] [--count 6] [--max-tokens 128]
                                       [--temperature 0.2 --top-p 0.9]

Batch size 1. The modes are interleaved prompt by prompt, so that a busy machine slows all alike;
`transformers` takes part only in greedy decoding (the default). Sampled requests are not seeded, and how
much a draft saves depends on what is drawn, so give such runs more prompts.
Every run generates exactly --max-tokens tokens, or fewer if a --schema ends the answer. Speed excludes the
first token, since only the first mode computes the prompt and later ones find it cached. Results are
medians over prompts and rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from benchmarks.environment import describe_arguments, describe_machine
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.engine.building import (
    ENGINES,
    NATIVE,
    WEIGHTS,
    BuiltTarget,
    EngineOptions,
    build_drafter,
    build_target,
)
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.drafts.lookup import LookupDrafting
from dspark_core.engine.drafts.lookup_building import build_lookup
from dspark_core.engine.grammars import GrammarCompiler, read_tokenizer
from dspark_core.engine.profiling.draft_profiler import profile_draft_time
from dspark_core.engine.profiling.profiler import profile_step_time
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import LocalPlanSource
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.records import GenerateRequest, SamplingParams, SpeculationOptions
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import DEFAULT_DRAFTER, NGRAMS_AUTO
from services.common.env import json_object

PROMPTS = (
    "Explain in three sentences how a refrigerator works.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train travels 60 miles in 1.5 hours. What is its average speed? Show your steps.",
    "Write a short letter to a friend about moving to a new city.",
    "List five tips for sleeping better and say why each helps.",
    "What are the main differences between a list and a tuple in Python?",
)

Generate = Callable[[tuple[int, ...], int], tuple[list[int], float]]
"""(prompt, token count) -> greedy tokens, and seconds."""

ON, OFF = "speculation on", "speculation off"
DRAFTER_ALONE, LOOKUP_ALONE, OWN_TEXT_ALONE = "drafter alone", "lookup alone", "own text alone"
MODES = {
    ON: SpeculationOptions(),
    DRAFTER_ALONE: SpeculationOptions(),
    LOOKUP_ALONE: SpeculationOptions(),
    OWN_TEXT_ALONE: SpeculationOptions(),
    OFF: SpeculationOptions(enabled=False),
}


@dataclass(slots=True)
class Runs:
    """Measurements of one mode."""

    tokens_per_second: list[float] = field(default_factory=list)
    accepted_lengths: list[float] = field(default_factory=list)
    outputs: dict[int, list[int]] = field(default_factory=dict)


class Ours:
    def __init__(
        self,
        target: BuiltTarget,
        options: EngineOptions,
        sampling: SamplingParams,
        ngrams: str,
        grammar: Grammar | None = None,
    ) -> None:
        self._sampling = sampling
        self._grammar = grammar
        grammars = GrammarCompiler(partial(read_tokenizer, target.facts.path), target.facts.config.vocab_size)
        source = LocalDraftSource(build_drafter(options, target.shared))
        step_time = profile_step_time(target.engine)
        draft_time = profile_draft_time(source, target.engine, (1,))
        drafting = Drafting(source, target.engine, deadline_seconds=60.0)
        self._loop = RoundLoop(
            target.engine,
            LocalPlanSource(RoundTimeModel(step_time, draft_time)),
            drafting=drafting,
            lookup=build_lookup(ngrams, options.target_model, target.facts),
            grammars=grammars,
        )
        # Each mode has its own planner, which learns only from that mode's rounds.
        self._alone = {
            DRAFTER_ALONE: RoundLoop(
                target.engine,
                LocalPlanSource(RoundTimeModel(step_time, draft_time)),
                drafting=drafting,
                grammars=grammars,
            )
        } | {
            name: RoundLoop(
                target.engine, LocalPlanSource(RoundTimeModel(step_time)), lookup=lookup, grammars=grammars
            )
            for name, lookup in (
                (LOOKUP_ALONE, build_lookup(ngrams, options.target_model, target.facts)),
                (OWN_TEXT_ALONE, LookupDrafting()),
            )
        }
        self._requests = 0

    def run(self, prompt: tuple[int, ...], max_tokens: int, mode: str) -> tuple[list[int], float, float]:
        """-> tokens, seconds after the first, accepted length; `mode` is a key of `MODES`."""
        self._requests += 1
        loop = self._alone.get(mode, self._loop)
        started: float | None = None
        loop.submit(
            GenerateRequest(
                request_id=str(self._requests),
                prompt_token_ids=prompt,
                max_tokens=max_tokens,
                sampling=self._sampling,
                speculation=MODES[mode],
                grammar=self._grammar,
            )
        )
        tokens: list[int] = []
        accepted_length = 1.0
        while loop.has_work:
            outputs = loop.step()
            if outputs and started is None:
                started = time.perf_counter()
            for output in outputs:
                tokens.extend(output.chunk.token_ids)
                if output.chunk.stats is not None:
                    accepted_length = output.chunk.stats.accepted_length
        return tokens, time.perf_counter() - (started or 0.0), accepted_length


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    options = EngineOptions(
        target_model=arguments.target_model,
        drafter=arguments.drafter,
        dtype=arguments.dtype,
        weights=arguments.weights,
        kv_cache_bytes=512 * 2**20,
        engine=arguments.engine,
        vllm_arguments=json_object("--vllm-arguments", arguments.vllm_arguments),
    )
    target = build_target(options)
    sampling = SamplingParams(temperature=arguments.temperature, top_p=arguments.top_p)
    grammar = None
    if arguments.schema is not None:
        text = arguments.schema.read_text(encoding="utf-8")
        grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text=text)
    ours = Ours(target, options, sampling, arguments.ngrams, grammar)
    with_twin = sampling.greedy and arguments.transformers and grammar is None
    twin = _twin(arguments.target_model, options.torch_dtype) if with_twin else None
    tokenizer = load_tokenizer(resolve_model_path(arguments.target_model))
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in _texts(arguments)]
    results = _measure(ours, twin, prompts, arguments.max_tokens, arguments.rounds)
    _print_table(results)
    document = {
        "benchmark": "single_stream",
        "arguments": describe_arguments(arguments),
        "environment": describe_machine(),
        "results": {name: _summary(runs) for name, runs in results.items()},
        "ratios": _ratios(results),
        "same_tokens_on_and_off": _agreement(results["speculation on"], results["speculation off"])
        if sampling.greedy
        else None,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


def _twin(model: str, dtype: torch.dtype) -> Generate:
    from benchmarks.peers_transformers import as_transformers, generate  # `make install` has no transformers

    return partial(generate, as_transformers(model, dtype))


def _measure(
    ours: Ours,
    twin: Generate | None,
    prompts: list[tuple[int, ...]],
    max_tokens: int,
    rounds: int,
) -> dict[str, Runs]:
    """Measure all modes; without a twin, `transformers` is left out."""
    results = {name: Runs() for name in MODES}
    if twin is not None:
        results["transformers"] = Runs()
    for warm_up in (True, *[False] * rounds):
        for index, prompt in enumerate(prompts[:1] if warm_up else prompts):
            for name, runs in results.items():
                if name == "transformers" and twin is not None:
                    _, until_first = twin(prompt, 1)
                    tokens, seconds = twin(prompt, max_tokens)
                    seconds, accepted = seconds - until_first, 1.0
                else:
                    tokens, seconds, accepted = ours.run(prompt, max_tokens, name)
                if not warm_up:
                    speed = (len(tokens) - 1) / seconds
                    runs.tokens_per_second.append(speed)
                    runs.accepted_lengths.append(accepted)
                    runs.outputs[index] = tokens
                    print(f"prompt {index + 1}/{len(prompts)} {name}: {speed:.1f} tokens/s")
    return results


def _texts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompts is None:
        return list(PROMPTS[: arguments.count])
    rows = [json.loads(line) for line in arguments.prompts.read_text(encoding="utf-8").splitlines()]
    return [row["turns"][0] for row in rows[: arguments.count]]


def _summary(runs: Runs) -> dict[str, float]:
    return {
        "tokens_per_second_median": statistics.median(runs.tokens_per_second),
        "tokens_per_second_min": min(runs.tokens_per_second),
        "tokens_per_second_max": max(runs.tokens_per_second),
        "accepted_length_mean": statistics.fmean(runs.accepted_lengths),
    }


def _ratios(results: dict[str, Runs]) -> dict[str, float]:
    """Medians of per-run ratios, so that only runs close in time are compared."""
    pairs = {
        "on over off": (ON, OFF),
        "drafter alone over off": (DRAFTER_ALONE, OFF),
        "lookup alone over off": (LOOKUP_ALONE, OFF),
        "own text alone over off": (OWN_TEXT_ALONE, OFF),
        "off over transformers": ("speculation off", "transformers"),
        "on over transformers": ("speculation on", "transformers"),
    }
    return {
        name: statistics.median(
            a / b
            for a, b in zip(results[first].tokens_per_second, results[second].tokens_per_second, strict=True)
        )
        for name, (first, second) in pairs.items()
        if first in results and second in results
    }


def _agreement(first: Runs, second: Runs) -> str:
    same = sum(first.outputs[index] == second.outputs[index] for index in first.outputs)
    return f"{same} of {len(first.outputs)} prompts"


def _print_table(results: dict[str, Runs]) -> None:
    print(f"\n{'':18} tokens/s   (min .. max)     accepted length")
    for name, runs in results.items():
        row = _summary(runs)
        speed, length = row["tokens_per_second_median"], row["accepted_length_mean"]
        spread = f"({row['tokens_per_second_min']:.1f} .. {row['tokens_per_second_max']:.1f})"
        print(f"{name:18} {speed:8.1f}   {spread:16} {length:.2f}")
    for name, ratio in _ratios(results).items():
        print(f"{name}: {ratio:.2f}x")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target-model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default=DEFAULT_DRAFTER)
    parser.add_argument(
        "--ngrams", default=NGRAMS_AUTO, help="n-gram table, as for `dspark up` (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--weights", default="stored", choices=WEIGHTS)
    parser.add_argument("--engine", default=NATIVE, choices=ENGINES, help="what computes the target")
    parser.add_argument("--vllm-arguments", default="{}", metavar="JSON", help="as for `dspark up`")
    parser.add_argument(
        "--prompts", type=Path, default=None, help="JSONL with 'turns' (default: built-in prompts)"
    )
    parser.add_argument(
        "--schema",
        type=Path,
        default=None,
        help="JSON schema that answers must follow; they end when complete",
    )
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 is off")
    parser.add_argument("--rounds", type=int, default=2, help="how often to measure each prompt")
    parser.add_argument(
        "--transformers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure transformers, if decoding is greedy",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/single_stream.json"))
    return parser


if __name__ == "__main__":
    main()
