"""Records draft outcomes by domain, for `dspark simulate`.

    python -m benchmarks.record_domains chat=alpaca.jsonl math=gsm8k.jsonl code=humaneval.jsonl --out FILE

Each file is a domain. Its first --limit prompts are answered greedily, one token a round. At every position
of an answer it records what the drafter and lookup would have drafted, with which confidence, and how much
of it would have been accepted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.environment import describe_arguments, describe_machine
from dspark_core.algorithms.lookup_chain import lookup_chain
from dspark_core.algorithms.ngram_table import NgramTable, empty_table
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.prefix_scheduler import survival_from_confidence
from dspark_core.algorithms.suffix_match import SuffixIndex
from dspark_core.engine.building import EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.drafts.lookup import BLOCK_TOKENS
from dspark_core.engine.drafts.lookup_building import find_table
from dspark_core.engine.protocols import DraftBlock, DraftItem, DraftReply, DraftSource
from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.evaluation.prompt_sets import PromptSet, read_prompt_set
from dspark_core.evaluation.recording import RecordingDrafts
from dspark_core.evaluation.runner import DRAFT_DEADLINE_SECONDS, EvalPrompt
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.records import GenerateRequest, SamplingParams
from dspark_core.simulation.domains import DEFAULTS, RecordedRequest, domains_document, stack_domains
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import DEFAULT_DRAFTER, NGRAMS_AUTO
from services.cli.drafters.answering import encode_prompts

Draft = tuple[tuple[int, ...], tuple[float, ...]]
"""Tokens, and their confidences c_1, c_2, ... (probability of acceptance given that earlier ones are)."""


@dataclass(slots=True)
class Answer:
    prompt: EvalPrompt
    token_ids: list[int] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    """By position: after the answer's first token, its second, and so on."""


class VerifyNothing(FullPlanSource):
    """Drafts for every request in every round and verifies nothing."""

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        return (0,) * len(requests)


class WholeBlocks(RecordingDrafts):
    """Always requests whole blocks, and keeps those of the latest round."""

    def __init__(self, source: DraftSource) -> None:
        super().__init__(source)
        self.latest: dict[str, DraftBlock] = {}

    def propose(self, items: Sequence[DraftItem]) -> Future[DraftReply]:
        future = super().propose([replace(one, most_tokens=self.geometry.block_size) for one in items])
        self.latest = {block.sequence_id: block for block in future.result(DRAFT_DEADLINE_SECONDS).blocks}
        return future


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    sets = [_read(one, arguments.limit) for one in arguments.domains]
    options = EngineOptions(target_model=arguments.target_model, drafter=arguments.drafter)
    tokenizer = load_tokenizer(resolve_model_path(options.target_model))
    target = build_target(options)
    source = WholeBlocks(LocalDraftSource(build_drafter(options, target.loaded)))
    prompts = encode_prompts(sets, tokenizer)
    longest = max(source.geometry.block_size, BLOCK_TOKENS)
    loop = RoundLoop(
        target.engine,
        VerifyNothing(),
        drafting=Drafting(source, target.engine, deadline_seconds=DRAFT_DEADLINE_SECONDS),
        limits=BatchLimits(max_running=arguments.concurrency, max_waiting=len(prompts)),
    )
    # `longest` extra tokens, so that the outcome of every recorded block is known.
    answers = answer(loop, source, prompts, arguments.max_tokens + longest, tokenizer.stop_token_ids)
    table = find_table(arguments.ngrams, options.target_model, target.loaded) or empty_table()
    domains = {
        one.name: [
            recorded(each, table, arguments.max_tokens)
            for each in answers
            if each.prompt.set_name == one.name
        ]
        for one in sets
    }
    _write(arguments, domains)


def answer(
    loop: RoundLoop,
    source: WholeBlocks,
    prompts: Sequence[EvalPrompt],
    max_tokens: int,
    stop_token_ids: tuple[int, ...],
) -> list[Answer]:
    answers = {prompt.request_id: Answer(prompt) for prompt in prompts}
    for prompt in prompts:
        loop.submit(
            GenerateRequest(
                request_id=prompt.request_id,
                prompt_token_ids=prompt.token_ids,
                max_tokens=max_tokens,
                sampling=SamplingParams(temperature=0.0),
                stop_token_ids=stop_token_ids,
            )
        )
    shown = Console(stderr=True)
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as progress:
        task = progress.add_task("answers", total=len(prompts) * max_tokens)
        while loop.has_work:
            for output in loop.step():
                known = answers[output.request_id]
                if known.token_ids:
                    block = source.latest.get(output.request_id)
                    known.drafts.append((block.token_ids, block.confidences) if block else ((), ()))
                known.token_ids += output.chunk.token_ids
                progress.advance(task)
            source.latest = {}
    return list(answers.values())


def recorded(answered: Answer, table: NgramTable, max_tokens: int) -> RecordedRequest:
    """Rows for the positions within the first `max_tokens` tokens of the answer."""
    tokens = answered.token_ids
    places = min(len(tokens), max_tokens) - 1
    drafted = list(_fates(answered.drafts[:places], tokens))
    looked_up = list(_fates(_lookups(answered.prompt.token_ids, tokens[:places], table), tokens))
    return RecordedRequest(
        survival=tuple(survival for survival, _ in drafted),
        accepted=tuple(stood for _, stood in drafted),
        looked_up=tuple(survival for survival, _ in looked_up),
        looked_up_accepted=tuple(stood for _, stood in looked_up),
        by_token=True,
    )


def _lookups(prompt: Sequence[int], answered: Sequence[int], table: NgramTable) -> Iterator[Draft]:
    """What lookup would have drafted after each token of an answer."""
    index, text = SuffixIndex(), list(prompt)
    for token_id in answered:
        text.append(token_id)
        yield lookup_chain(table, text, index.longest(text, BLOCK_TOKENS), BLOCK_TOKENS)


def _fates(
    drafts: Sequence[Draft] | Iterator[Draft], tokens: Sequence[int]
) -> Iterator[tuple[tuple[float, ...], int]]:
    """Per position: survival of its draft, and how many of its tokens match the answer's continuation."""
    for place, (drafted, confidences) in enumerate(drafts):
        following = tokens[place + 1 :]
        stood = 0
        for token_id, truth in zip(drafted, following, strict=False):
            if token_id != truth:
                break
            stood += 1
        yield survival_from_confidence(confidences), stood


def _write(arguments: argparse.Namespace, domains: dict[str, list[RecordedRequest]]) -> None:
    machine = {"arguments": describe_arguments(arguments), "environment": describe_machine()}
    document = domains_document(domains, machine)
    arguments.out.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
    rows = stack_domains(domains)
    for name in domains:
        print(f"{name}: accepted length {rows.accepted_length(name):.2f} of whole blocks")
    print(f"written to {arguments.out}")


def _read(text: str, limit: int) -> PromptSet:
    name, _, file = text.partition("=")
    return PromptSet(name, read_prompt_set(Path(file), limit).rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("domains", nargs="+", metavar="NAME=FILE", help="JSONL with 'turns' or 'prompt'")
    parser.add_argument("--limit", type=int, default=16, help="prompts per domain")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--target-model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default=DEFAULT_DRAFTER)
    parser.add_argument(
        "--ngrams", default=NGRAMS_AUTO, help="n-gram table, as for `dspark up` (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=DEFAULTS)
    return parser


if __name__ == "__main__":
    main()
