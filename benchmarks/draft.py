"""Milliseconds of a draft pass and of acceptance, by batch, sampling parameters and part.

    python -m benchmarks.draft [--batches 1 8 32] [--rows 8 64 128] [--seconds 1.0]

Contexts, features and logits come from the target, over answers it generates first, because the cost of
sampling depends on how peaked a distribution is. Every figure is the median of calls repeated for --seconds.
Like a round, a draft pass appends the features of two tokens to each context. `parts` are the steps of a
greedy pass, timed one by one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import describe_arguments, describe_machine
from benchmarks.single_stream import PROMPTS
from dspark_core.engine.building import BuiltTarget, EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engines.base import Appended, ContextDraftEngine
from dspark_core.engine.draft_engines.block_draw import block_draw
from dspark_core.engine.draft_engines.block_layers import block_layers, block_room
from dspark_core.engine.draft_engines.draft_context import DraftContext
from dspark_core.engine.protocols import DraftBlock, DraftItem
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.sequence import SequenceState
from dspark_core.engine.target.batch import Run
from dspark_core.engine.verdicts.acceptance import Acceptor, Proposal
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.models.drafter_checkpoint import load_drafter
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.records import GenerateRequest, SamplingParams, SpeculationOptions, Verification
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import DEFAULT_DRAFTER, resolve_drafter_path

ANSWER_TOKENS = 128
TOKENS_PER_ROUND = 2


@dataclass(frozen=True, slots=True)
class Setting:
    name: str
    sampling: SamplingParams
    verification: Verification = Verification.REJECTION


SETTINGS = (
    Setting("T=0", SamplingParams(temperature=0.0)),
    Setting("T=0.2 top-p 0.9", SamplingParams(temperature=0.2, top_p=0.9)),
    Setting("T=1", SamplingParams()),
    Setting(
        "T=0.2 top-p 0.9 coupled", SamplingParams(temperature=0.2, top_p=0.9, seed=1), Verification.COUPLED
    ),
    Setting("T=1 coupled", SamplingParams(seed=1), Verification.COUPLED),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt with the target's greedy answer, features and logits."""

    tokens: list[int]
    prompt_length: int
    features: Tensor  # [tokens, feature size]
    logits: Tensor  # [tokens, vocab]


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    options = EngineOptions(
        target_model=arguments.target_model,
        drafter=arguments.drafter,
        dtype=arguments.dtype,
        kv_cache_bytes=512 * 2**20,
    )
    target = build_target(options)
    answers = _answers(target, arguments.target_model)
    engine = build_drafter(options, target.loaded, generator=torch.Generator().manual_seed(0))
    measure = Stopwatch(arguments.seconds)
    document: dict[str, object] = {
        "benchmark": "draft",
        "arguments": describe_arguments(arguments),
        "environment": describe_machine(),
        "unit": "milliseconds, medians",
    }
    if "draft" in arguments.only:
        document["draft"] = {b: _draft_times(engine, answers, b, measure) for b in arguments.batches}
    if "parts" in arguments.only:
        drafter = _model(options, target)
        document["parts"] = {b: _part_times(drafter, answers, b, measure) for b in arguments.batches}
    if "accept" in arguments.only:
        document["accept"] = {n: _accept_times(engine, answers, n, measure) for n in arguments.rows}
    for title in ("draft", "parts", "accept"):
        _print_table(title, document.get(title))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


class Stopwatch:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, action: Callable[[], object]) -> float:
        """Median milliseconds of `action`, after a warm-up."""
        for _ in range(3):
            action()
        times: list[float] = []
        end = time.perf_counter() + self._seconds
        while not times or time.perf_counter() < end:
            started = time.perf_counter()
            action()
            times.append(time.perf_counter() - started)
        return round(1000 * statistics.median(times), 3)


def _answers(target: BuiltTarget, model: str) -> list[Answer]:
    tokenizer = load_tokenizer(resolve_model_path(model))
    loop = RoundLoop(target.engine, FullPlanSource())
    prompts = [list(tokenizer.encode_chat([{"role": "user", "content": text}])) for text in PROMPTS]
    for index, prompt in enumerate(prompts):
        loop.submit(
            GenerateRequest(
                request_id=str(index),
                prompt_token_ids=tuple(prompt),
                max_tokens=ANSWER_TOKENS,
                sampling=SamplingParams(temperature=0.0),
            )
        )
    generated: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    while loop.has_work:
        for output in loop.step():
            generated[output.request_id].extend(output.chunk.token_ids)
    return [_forward(target, prompt, generated[str(index)]) for index, prompt in enumerate(prompts)]


def _forward(target: BuiltTarget, prompt: list[int], answer: list[int]) -> Answer:
    tokens = [*prompt, *answer]
    # Nothing else runs on this engine any more, so any pages will do.
    pages = list(range(1, 2 + len(tokens) // target.engine.page_tokens))
    logits = target.engine.forward([Run(tokens, 0, pages, len(tokens))]).clone()
    return Answer(tokens, len(prompt), target.engine.read_features(pages, 0, len(tokens)), logits)


def _model(options: EngineOptions, target: BuiltTarget) -> DSparkDrafter:
    decoder = target.loaded.decoder
    directory = resolve_drafter_path(options.drafter or DEFAULT_DRAFTER)
    embed, head = decoder.embed_tokens.weight, decoder.lm_head.weight
    drafter = load_drafter(directory, embed, head, target.loaded.config, options.torch_dtype)
    drafter.pack(byte_products=True)
    return drafter


def _item(answer: Answer, sequence_id: str, start: int, anchor: int, setting: Setting) -> DraftItem:
    return DraftItem(
        sequence_id=sequence_id,
        anchor_token_id=answer.tokens[anchor],
        anchor_position=anchor,
        features_start=start,
        features=answer.features[start:anchor],
        token_ids=tuple(answer.tokens[start:anchor]),
        sampling=setting.sampling,
        verification=setting.verification,
    )


def _rounds(
    engine: ContextDraftEngine, answers: Sequence[Answer], batch: int, setting: Setting
) -> Iterator[list[DraftItem]]:
    """Endless rounds of items; contexts are primed first, and again at the end of an answer."""
    chosen = [answers[index % len(answers)] for index in range(batch)]
    names = [f"{setting.name}-{index}" for index in range(batch)]
    while True:
        ends = [answer.prompt_length for answer in chosen]
        engine.propose([_item(a, n, 0, e, setting) for a, n, e in zip(chosen, names, ends, strict=True)])
        while all(e + TOKENS_PER_ROUND < len(a.tokens) for a, e in zip(chosen, ends, strict=True)):
            yield [
                _item(a, n, e, e + TOKENS_PER_ROUND, setting)
                for a, n, e in zip(chosen, names, ends, strict=True)
            ]
            ends = [end + TOKENS_PER_ROUND for end in ends]


def _draft_times(
    engine: ContextDraftEngine, answers: Sequence[Answer], batch: int, measure: Stopwatch
) -> dict[str, float]:
    times = {}
    for setting in SETTINGS:
        rounds = _rounds(engine, answers, batch, setting)
        times[setting.name] = measure(lambda rounds=rounds: engine.propose(next(rounds)))  # type: ignore[misc]
        engine.release([f"{setting.name}-{index}" for index in range(batch)])
    return times


@torch.inference_mode()
def _part_times(
    drafter: DSparkDrafter, answers: Sequence[Answer], batch: int, measure: Stopwatch
) -> dict[str, float]:
    """Each part is timed on its own, repeatedly, so its data is already in the CPU's caches."""
    window, room = drafter.config.context_window, block_room(drafter)
    context = DraftContext(num_pages=64 * batch, page_tokens=16, window=window, room=room)
    layers = block_layers(drafter, context)
    chosen = [answers[index % len(answers)] for index in range(batch)]
    items = [
        _item(answer, str(index), 0, answer.prompt_length, SETTINGS[0]) for index, answer in enumerate(chosen)
    ]
    appended = [Appended(item, max(0, item.anchor_position - (window or 2**31))) for item in items]
    for one in appended:
        context.reserve(one.item.sequence_id, one.start, one.end, in_use=())
    layers.append(appended, torch.cat([one.item.features[one.start :] for one in appended]))
    latest = [Appended(item, item.anchor_position - TOKENS_PER_ROUND) for item in items]
    new = torch.cat([item.features[-TOKENS_PER_ROUND:] for item in items])
    anchors = torch.tensor([item.anchor_token_id for item in items])
    block = drafter.config.block_size
    hidden = layers.hidden(items, block)
    draw = block_draw(drafter, torch.Generator())
    return {
        "context keys and values": measure(lambda: layers.append(latest, new)),
        "layers": measure(lambda: layers.hidden(items, block)),
        "LM head": measure(lambda: drafter.float_logits(hidden)),
        "LM head and greedy draw": measure(lambda: draw(items, anchors, hidden)),
    }


def _accept_times(
    engine: ContextDraftEngine, answers: Sequence[Answer], rows: int, measure: Stopwatch
) -> dict[str, float]:
    """Acceptance over about `rows` target rows, where each sequence verifies a whole block."""
    block = engine.geometry.block_size
    times = {}
    for setting in SETTINGS:
        count = max(1, rows // (block + 1))
        items = next(_rounds(engine, answers, count, setting))
        proposals = [
            _proposal(answers[index % len(answers)], drafted, setting, item.anchor_position)
            for index, (item, drafted) in enumerate(zip(items, engine.propose(items), strict=True))
        ]
        logits = torch.cat(
            [
                answers[index % len(answers)].logits[item.anchor_position :][: block + 1]
                for index, item in enumerate(items)
            ]
        )
        acceptor = Acceptor(torch.Generator().manual_seed(0))
        # The acceptor may overwrite its logits, which the engine computes anew every round.
        copies = [logits.clone() for _ in range(3)]
        copying = measure(lambda: copies[0].copy_(logits))  # noqa: B023
        total = measure(lambda: acceptor.accept(copies[0].copy_(logits), proposals))  # noqa: B023
        times[setting.name] = round(total - copying, 3)
        engine.release([item.sequence_id for item in items])
    return times


def _proposal(answer: Answer, block: DraftBlock, setting: Setting, anchor: int) -> Proposal:
    request = GenerateRequest(
        request_id=block.sequence_id,
        prompt_token_ids=tuple(answer.tokens[: anchor + 1]),
        sampling=setting.sampling,
        speculation=SpeculationOptions(verification=setting.verification),
    )
    sequence = SequenceState(request=request, order=0, noise_seed=1, max_length=len(answer.tokens))
    return Proposal(sequence, block, len(block.token_ids))


def _print_table(title: str, table: object) -> None:
    if not isinstance(table, dict):
        return
    columns = list(table)
    print(f"\n{title:26}" + "".join(f"{column:>10}" for column in columns))
    for row in table[columns[0]]:
        print(f"{row:26}" + "".join(f"{table[column][row]:10.2f}" for column in columns))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target-model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default=DEFAULT_DRAFTER)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="sequences per draft pass")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[8, 64, 128], help="target rows per acceptance step"
    )
    parser.add_argument("--only", nargs="+", default=["draft", "parts", "accept"])
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds spent on each figure")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/draft.json"))
    return parser


if __name__ == "__main__":
    main()
