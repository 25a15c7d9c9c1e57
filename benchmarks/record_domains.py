"""Records how drafts fare by domain, for `dspark simulate`.

    python -m benchmarks.record_domains chat=alpaca.jsonl math=gsm8k.jsonl code=humaneval.jsonl --out FILE

Each file is a domain: its first --limit prompts are answered with every draft token verified, and
confidences and accepted lengths of all rounds are kept by request.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.environment import describe_arguments, describe_machine
from dspark_core.engine.building import EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engine import LocalDraftSource
from dspark_core.evaluation.prompt_sets import PromptSet, read_prompt_set
from dspark_core.evaluation.round_table import DraftRound
from dspark_core.evaluation.runner import EvalRun, EvalRunner, EvalSettings, draft_generator
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.simulation.domains import DEFAULTS, RecordedRequest, domains_document
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import DEFAULT_DRAFTER
from services.cli.answering import encode_prompts, run_with_progress


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    sets = [_read(one, arguments.limit) for one in arguments.domains]
    options = EngineOptions(target_model=arguments.target_model, drafter=arguments.drafter)
    tokenizer = load_tokenizer(resolve_model_path(options.target_model))
    target = build_target(options)
    settings = EvalSettings(max_tokens=arguments.max_tokens, temperature=arguments.temperature)
    drafter = build_drafter(options, target.loaded, generator=draft_generator(settings.seed))
    stops = tokenizer.stop_token_ids
    runner = EvalRunner(target.engine, LocalDraftSource(drafter), settings, stop_token_ids=stops)
    run = run_with_progress(runner, encode_prompts(sets, tokenizer))
    domains = {one.name: _requests(run, one.name) for one in sets}
    source = {
        "arguments": describe_arguments(arguments),
        "environment": describe_machine(),
    }
    document = domains_document(domains, source)
    arguments.out.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
    for name, requests in domains.items():
        accepted = [value for one in requests for value in one.accepted]
        print(f"{name}: {len(accepted)} rounds, accepted length {1 + sum(accepted) / len(accepted):.2f}")
    print(f"written to {arguments.out}")


def _read(text: str, limit: int) -> PromptSet:
    name, _, file = text.partition("=")
    return PromptSet(name, read_prompt_set(Path(file), limit).rows)


def _requests(run: EvalRun, name: str) -> list[RecordedRequest]:
    answers = [[one for one in a.rounds if _whole(one)] for a in run.answered if a.prompt.set_name == name]
    return [
        RecordedRequest(
            survival=tuple(one.survival for one in rounds), accepted=tuple(one.accepted for one in rounds)
        )
        for rounds in answers
    ]


def _whole(one: DraftRound) -> bool:
    """A stop token cut the others short: what would have followed was never put to the test."""
    return bool(one.survival) and not one.stopped


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("domains", nargs="+", metavar="NAME=FILE", help="JSONL with 'turns' or 'prompt'")
    parser.add_argument("--limit", type=int, default=16, help="prompts per domain")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--target-model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default=DEFAULT_DRAFTER)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=DEFAULTS)
    return parser


if __name__ == "__main__":
    main()
