"""Gemma targets in the engine: paged windows, chunked prefill and speculation change no token."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.target.batch import Run, attention_groups, build_batch
from dspark_core.models.config import DrafterConfig, Eagle3Config, MtpConfig, draft_backbone
from dspark_core.models.drafter_checkpoint import save_drafter
from dspark_core.models.eagle3_checkpoint import save_eagle3
from dspark_core.models.loading import LoadedTarget, load_target
from dspark_core.models.mtp_checkpoint import save_mtp
from dspark_core.records import SamplingParams
from dspark_core.training.data.conversations import Conversation
from dspark_core.training.data.prefill import compute_packed
from dspark_core.training.initial import new_drafter
from dspark_core.training.objectives.eagle3 import new_eagle3
from dspark_core.training.objectives.mtp1 import new_mtp
from tests.unit.engine.checkpoint_loops import loop_of
from tests.unit.engine.tiny import request, run
from tests.unit.models.gemma_tiny import GEMMAS, VOCAB, WINDOW
from tests.unit.models.target_checkpoints import save_hf

NAMES = ("gemma4 small", "gemma4 large", "gemma3")
TOKENS = 3 * WINDOW


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: a target's directory, with DSpark, Eagle3 and MTP-1 drafters built for it."""
    made = {}
    for name in NAMES:
        made[name] = directory = tmp_path_factory.mktemp("gemma")
        save_hf(GEMMAS[name](), directory)
        target = load_target(str(directory), torch.float32, pack=False)
        torch.manual_seed(0)
        # Copies of target layers make drafts that are neither always right nor always wrong.
        save_drafter(directory / "dspark", new_drafter(dspark_config(target), target.decoder, None, (3, 1)))
        config = MtpConfig(
            backbone=draft_backbone(target.config, 1), num_target_layers=target.config.num_layers
        )
        save_eagle3(directory / "eagle3", new_eagle3(eagle3_config(target), target, None, 3))
        save_mtp(directory / "mtp", new_mtp(config, target, None, 3))
    return made


def dspark_config(target: LoadedTarget) -> DrafterConfig:
    return DrafterConfig(
        backbone=draft_backbone(target.config, 2),
        num_target_layers=target.config.num_layers,
        target_layer_ids=(-1, 1, 3),
        block_size=4,
        mask_token_id=VOCAB - 1,
        markov_rank=4,
        confidence_head=True,
        confidence_head_with_markov=True,
    )


def eagle3_config(target: LoadedTarget) -> Eagle3Config:
    return Eagle3Config(
        backbone=draft_backbone(target.config, 1),
        num_target_layers=target.config.num_layers,
        target_layer_ids=(-1, 1, 3),
        block_size=3,
    )


def prompts() -> list[list[int]]:
    """Shorter and longer than the window."""
    source = random.Random(0)
    return [[source.randrange(VOCAB) for _ in range(length)] for length in (1, 5, WINDOW, 20, 45)]


def generated(loop: RoundLoop, sampling: SamplingParams) -> dict[str, list[int]]:
    asked = [request(f"r{i}", prompt, TOKENS, sampling=sampling) for i, prompt in enumerate(prompts())]
    return run(loop, asked)


@torch.inference_mode()
def alone(directory: Path) -> dict[str, list[int]]:
    """Greedy decoding by full passes without a cache."""
    decoder = load_target(str(directory), torch.float32, pack=False).decoder
    found = {}
    for index, prompt in enumerate(prompts()):
        tokens = list(prompt)
        for _ in range(TOKENS):
            (features,) = compute_packed(decoder, [Conversation(tuple(tokens), ())], (0,))
            tokens.append(int(decoder.logits(features.final[-1:]).argmax()))
        found[f"r{index}"] = tokens[len(prompt) :]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_greedy_output_is_the_targets_own(name: str, directories: dict[str, Path]) -> None:
    directory, greedy = directories[name], SamplingParams(temperature=0.0)
    expected = alone(directory)
    assert len({token for tokens in expected.values() for token in tokens}) > 5
    for drafter in (None, "dspark", "eagle3", "mtp"):
        for limits in ({}, {"prefill_chunk_tokens": 7, "max_batch_tokens": 16, "max_running": 3}):
            assert generated(loop_of(directory, drafter, **limits), greedy) == expected, (drafter, limits)


def test_seeded_output_is_the_same_with_and_without_drafts(directories: dict[str, Path]) -> None:
    sampling = SamplingParams(temperature=0.8, seed=7)
    plain = generated(loop_of(directories["gemma4 small"], None), sampling)
    assert generated(loop_of(directories["gemma4 small"], "dspark"), sampling) == plain


def test_right_drafts_are_accepted(directories: dict[str, Path]) -> None:
    """Otherwise the tests above would also pass if drafts were ignored."""
    loop = loop_of(directories["gemma3"], "dspark")
    for index, prompt in enumerate(prompts()):
        loop.submit(request(f"r{index}", prompt, TOKENS))
    accepted = 0
    while loop.has_work:
        for output in loop.step():
            if output.chunk.stats is not None:
                accepted += output.chunk.stats.accepted_tokens
    assert accepted > 0


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_a_group_shows_every_token_its_window_and_nothing_else(window: int | None) -> None:
    runs = [
        Run((1, 2, 3), 0, [4], 1),
        Run((1,) * 5, 9, [7, 2, 5, 1], 1),
        Run((1,), 13, [3, 6, 0, 8], 1),
        Run((1,) * 40, 3, list(range(10, 21)), 1),
    ]
    batch = build_batch(runs, page_tokens=4)
    seen: dict[int, list[int]] = {}
    for group in attention_groups(runs, page_tokens=4, dtype=torch.float32, window=window):
        real = torch.ones_like(group.query_rows, dtype=torch.bool)
        real = real if group.query_mask is None else group.query_mask
        assert bool((group.bias == 0).any(dim=-1).all())  # a row of only -inf gives NaN
        for at, column in real.nonzero().tolist():
            shown = group.context_slots[at][group.bias[at, 0, column] == 0]
            seen[int(group.query_rows[at, column])] = shown.tolist()
    expected, row = {}, 0
    for one in runs:
        for position in range(one.start, one.start + len(one.token_ids)):
            first = 0 if window is None else max(0, position - window + 1)
            expected[row] = [one.pages[p // 4] * 4 + p % 4 for p in range(first, position + 1)]
            row += 1
    assert row == batch.num_tokens
    assert seen == expected


def test_windowed_layers_gather_no_more_than_they_see() -> None:
    run_ = Run((1,) * 4, 396, list(range(100)), 1)
    (group,) = attention_groups([run_], page_tokens=4, dtype=torch.float32, window=WINDOW)
    assert group.context_slots.shape == (1, WINDOW - 1 + 4)
