"""Eagle3's and MTP-1's objectives: the losses' mathematics, and that training sees what inference does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.engine.draft_engines.autoregressive import AutoregressiveDraftEngine
from dspark_core.engine.protocols import DraftItem
from dspark_core.errors import ConfigError
from dspark_core.models.drafter_kinds import load_any_drafter
from dspark_core.models.eagle3 import Eagle3Drafter
from dspark_core.models.eagle3_checkpoint import load_eagle3
from dspark_core.models.moe_config import MoeConfig
from dspark_core.records import SamplingParams, Verification
from dspark_core.training.features import FeatureSequence
from dspark_core.training.objectives.chains import ChainObjective, PairedBatch
from dspark_core.training.objectives.protocol import ObjectiveReport
from dspark_core.training.objectives.registry import ALGORITHMS
from dspark_core.training.recipe import DrafterRecipe, LossConfig
from dspark_core.training.vocabulary_loss import VocabularyLoss, VocabularyRows
from tests.unit.models.autoregressive_tiny import TARGET
from tests.unit.models.dspark_golden import GOLDEN, golden, golden_target, run_target
from tests.unit.training.loss_definition import target_probabilities
from tests.unit.training.training_sequences import GOLDEN_LAYERS, greedy_sequence

ALGORITHM_NAMES = pytest.mark.parametrize("name", ["eagle3", "mtp1"])


def build(name: str, ids: torch.Tensor | None = None, **losses: float) -> ChainObjective:
    torch.manual_seed(0)
    recipe = DrafterRecipe(
        algorithm=name, target_layer_ids=GOLDEN_LAYERS, num_layers=1, source_layers=(7,), block_size=3
    )
    config = LossConfig(**({"confidence_weight": 0.0, "cross_entropy_weight": 1.0} | losses))
    objective = ALGORITHMS[name].build(recipe, config, golden_target(), ids)
    objective.module.requires_grad_(True)
    assert isinstance(objective, ChainObjective)
    return objective


def greedy_answers() -> list[FeatureSequence]:
    rows = [golden("dspark_vanilla")["generation"][i] for i in range(3)]
    return [greedy_sequence(row["output"], len(row["prompt"])) for row in rows]


def backward(objective: ChainObjective, sequences: Sequence[FeatureSequence]) -> ObjectiveReport:
    return objective.backward(sequences, generators(len(sequences)), lambda sums: sums)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), cross_entropy=st.floats(0, 2), distance=st.floats(0, 2))
def test_soft_labels_teach_the_targets_distribution(seed: int, cross_entropy: float, distance: float) -> None:
    """Loss and gradient of cross-entropy against whole distributions, from their definition."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(6, 5, generator=generator).requires_grad_()
    full = torch.randn(30, 5, generator=generator)
    head, state = full[:20], torch.randn(6, 5, generator=generator)
    weights = torch.rand(6, generator=generator)
    normalizers = (state @ full.T).logsumexp(dim=-1)
    rows = VocabularyRows(
        target_hidden=state,
        log_normalizers=normalizers,
        labels=torch.zeros(6, dtype=torch.long),
        cross_entropy_scale=cross_entropy * weights,
        distance_scale=distance * weights,
        soft_labels=True,
    )
    found = VocabularyLoss(4)(hidden, head, rows)
    found.total.backward()
    gradient, hidden.grad = hidden.grad, None

    wanted = target_probabilities(state, head, normalizers)
    log_draft = torch.log_softmax(F.linear(hidden, head), dim=-1)
    nll = -(wanted * log_draft).sum(dim=-1)
    apart = (log_draft.exp() - wanted).abs().sum(dim=-1) + 1 - wanted.sum(dim=-1)
    defined = ((cross_entropy * nll + distance * apart) * weights).sum()
    defined.backward()
    torch.testing.assert_close(found.total, defined)
    torch.testing.assert_close(found.cross_entropy, nll)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", golden("eagle3")["generation"])
def test_a_chain_of_the_drafters_own_tokens_predicts_what_deepspec_drafted(case: dict) -> None:
    """Teacher forcing with the tokens that were drafted is inference."""
    decoder = golden_target().decoder
    drafter = load_eagle3(
        GOLDEN / "eagle3", decoder.embed_tokens.weight, decoder.lm_head.weight, TARGET, torch.float32
    )
    objective = ALGORITHMS["eagle3"].build(
        DrafterRecipe(algorithm="eagle3", target_layer_ids=(1, 2, 3, 4, 5), block_size=7),
        LossConfig(),
        golden_target(),
        None,
    )
    assert isinstance(objective.module, Eagle3Drafter)
    objective.module.load_state_dict(drafter.state_dict())
    committed = len(case["prompt"])
    for round_ in case["rounds"]:
        tokens = case["output"][:committed] + round_["candidates"]
        output = run_target(tokens, (1, 2, 3, 4, 5))
        sequence = FeatureSequence(
            torch.tensor(tokens), committed, output.taps, output.hidden, torch.zeros(len(tokens))
        )
        batch = PairedBatch.of([sequence], [torch.tensor([committed])], 7)
        hidden = objective.chains(batch, batch.packed.taps)
        drafts = F.linear(hidden, drafter.lm_head).argmax(dim=-1)[0].tolist()
        assert drafts == round_["candidates"][1:]
        committed += round_["accepted"] + 1


@torch.no_grad()
@ALGORITHM_NAMES
def test_every_first_step_predicts_what_the_engine_drafts(name: str) -> None:
    """All anchors of two packed sequences against the engine, which sees one request at a time."""
    objective = build(name, torch.arange(0, 512, 2))
    drafter = objective.module.eval()
    engine = AutoregressiveDraftEngine(drafter, fingerprint="", num_pages=64, page_tokens=4)
    sequences = [objective.inputs(sequence) for sequence in greedy_answers()[:2]]
    anchors = [torch.arange(s.answer_start, len(s) - 1) for s in sequences]
    batch = PairedBatch.of(sequences, anchors, objective.block_size)
    logits = F.linear(objective.chains(batch, batch.packed.taps)[:, 0], drafter.lm_head)
    expected = []
    for row, (sequence, positions) in enumerate(zip(sequences, anchors, strict=True)):
        features = drafter.projection(sequence.taps)
        for anchor in positions.tolist():
            item = DraftItem(
                sequence_id=f"{row}-{anchor}",
                anchor_token_id=int(sequence.token_ids[anchor]),
                anchor_position=anchor,
                features_start=0,
                features=features[:anchor],
                token_ids=tuple(sequence.token_ids[:anchor].tolist()),
                sampling=SamplingParams(temperature=0.0),
                verification=Verification.REJECTION,
            )
            (block,) = engine.propose([item])
            expected.append(block)
    assert drafter.target_ids(logits.argmax(dim=-1)).tolist() == [block.token_ids[0] for block in expected]
    likeliest = torch.softmax(logits, dim=-1).amax(dim=-1).tolist()
    assert likeliest == pytest.approx([block.confidences[0] for block in expected], abs=1e-4)


@ALGORITHM_NAMES
def test_training_lowers_the_loss(name: str) -> None:
    objective, sequences = build(name), greedy_answers()
    optimizer = torch.optim.AdamW(objective.module.parameters(), lr=3e-3)
    reports = []
    for _ in range(30):
        optimizer.zero_grad()
        reports.append(backward(objective, sequences))
        optimizer.step()
    first, last = reports[0], reports[-1]
    assert (last.counted == first.counted).all()
    if name == "mtp1":
        assert float(last.cross_entropy.mean()) < 0.7 * float(first.cross_entropy.mean())
    else:  # against whole distributions, which are flat here
        assert float(last.cross_entropy.mean()) < float(first.cross_entropy.mean())
        assert (last.accepted > first.accepted).all()


@ALGORITHM_NAMES
def test_every_parameter_is_trained(name: str) -> None:
    objective = build(name)
    backward(objective, greedy_answers())
    still = [n for n, p in objective.module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@ALGORITHM_NAMES
def test_workers_gradients_add_up_to_the_batchs(name: str) -> None:
    sequences = greedy_answers()
    whole = build(name, torch.arange(0, 512, 2), distance_weight=0.5)
    sums: list[torch.Tensor] = []
    whole.backward(sequences, generators(3), lambda x: sums.append(x) or x)  # type: ignore[func-returns-value]
    parts = build(name, torch.arange(0, 512, 2), distance_weight=0.5)
    for rows in (slice(0, 1), slice(1, 3)):
        parts.backward(sequences[rows], generators(3)[rows], lambda _: sums[0])
    for one, other in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


@ALGORITHM_NAMES
def test_what_lies_outside_the_draft_vocabulary_is_not_learnt(name: str) -> None:
    sequences = greedy_answers()
    absent = torch.tensor([i for i in range(512) if all(i not in s.token_ids for s in sequences)][:16])
    report = backward(build(name, absent), sequences)
    counted = float(report.cross_entropy.denominator)
    # MTP-1 learns from labels, Eagle3 from the target's distribution, which is never quite zero.
    assert counted == 0 if name == "mtp1" else counted > 0
    assert float(report.distance.mean()) > 1


@ALGORITHM_NAMES
def test_the_saved_checkpoint_is_the_trained_module(name: str, tmp_path: Path) -> None:
    objective = build(name, torch.arange(0, 512, 2))
    objective.save(tmp_path)
    loaded = load_any_drafter(tmp_path, golden_target().decoder, TARGET, torch.float32)
    assert loaded.config == objective.module.config
    for key, value in objective.module.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_features_of_another_width_are_refused() -> None:
    sequence = greedy_answers()[0]
    narrow = FeatureSequence(
        sequence.token_ids,
        sequence.answer_start,
        sequence.taps[:, :64],
        sequence.final,
        sequence.log_normalizers,
    )
    with pytest.raises(ConfigError, match=r"target_layer_ids \[1, 3, 5\] needs 192 .* the features hold 64"):
        backward(build("eagle3"), [narrow])


@ALGORITHM_NAMES
def test_more_than_one_source_layer_is_refused(name: str) -> None:
    recipe = DrafterRecipe(algorithm=name, target_layer_ids=(1,), num_layers=2, source_layers=(6, 7))
    with pytest.raises(ConfigError, match=rf"source_layers of {name} must name one layer, got \[6, 7\]"):
        ALGORITHMS[name].build(recipe, LossConfig(), golden_target(), None)


@ALGORITHM_NAMES
def test_experts_are_refused(name: str) -> None:
    moe = MoeConfig(num_experts=2, experts_per_token=1, expert_size=8)
    recipe = DrafterRecipe(algorithm=name, target_layer_ids=(1,), moe=moe)
    with pytest.raises(ConfigError, match=f"moe does not apply to {name}"):
        ALGORITHMS[name].build(recipe, LossConfig(), golden_target(), None)


@ALGORITHM_NAMES
def test_more_than_one_layer_is_refused(name: str) -> None:
    recipe = DrafterRecipe(algorithm=name, target_layer_ids=(1,), num_layers=3)
    with pytest.raises(ConfigError, match=f"layers of {name} must be 1 or left out, got 3"):
        ALGORITHMS[name].build(recipe, LossConfig(), golden_target(), None)


@ALGORITHM_NAMES
def test_a_window_is_refused(name: str) -> None:
    recipe = DrafterRecipe(algorithm=name, target_layer_ids=(1,), context_window=8)
    with pytest.raises(ConfigError, match=f"window does not apply to {name}"):
        ALGORITHMS[name].build(recipe, LossConfig(), golden_target(), None)
