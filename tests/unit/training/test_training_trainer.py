"""The trainer learns, resumes exactly, and starts from the target's weights."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from dspark_core.errors import ConfigError
from dspark_core.models.config import DrafterConfig
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.training.features import SequenceRef, list_sequences, write_shard
from dspark_core.training.initial import choose_draft_vocab, new_drafter
from dspark_core.training.objectives.dspark import DSparkObjective
from dspark_core.training.recipe import LossConfig
from dspark_core.training.trainer import StepReport, Trainer, TrainerConfig, rate_share
from dspark_core.training.validate import replay_greedy_rounds
from tests.unit.models.dspark_golden import decode_greedily, golden, golden_drafter, golden_target
from tests.unit.training.training_sequences import GOLDEN_LAYERS, greedy_sequence, random_sequence


def _config(**fields) -> DrafterConfig:
    base = golden_drafter("dspark_vanilla").config
    defaults = {
        "backbone": base.backbone,
        "num_target_layers": base.num_target_layers,
        "target_layer_ids": GOLDEN_LAYERS,
        "block_size": 4,
        "mask_token_id": 511,
        "markov_rank": 8,
        "confidence_head": True,
        "confidence_head_with_markov": True,
        "context_window": 16,
    }
    return DrafterConfig(**(defaults | fields))


def _fresh(draft_vocab_ids: torch.Tensor | None = None) -> DSparkDrafter:
    torch.manual_seed(0)
    size = None if draft_vocab_ids is None else len(draft_vocab_ids)
    return new_drafter(_config(draft_vocab_size=size), golden_target().decoder, draft_vocab_ids, (6, 7))


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> list[SequenceRef]:
    shard = tmp_path_factory.mktemp("shards") / "a.safetensors"
    rows = [golden("dspark_vanilla")["generation"][i] for i in range(3)]
    write_shard(shard, [greedy_sequence(row["output"], len(row["prompt"])) for row in rows])
    return list_sequences(shard)


def _trainer(refs: list[SequenceRef], steps: int, **fields) -> Trainer:
    ids = torch.arange(0, 512, 2).sort().values
    losses = {"anchors_per_sequence": 8, "slice_anchors": 5}
    names = {field.name for field in dataclasses.fields(LossConfig)}
    losses |= {name: fields.pop(name) for name in names & fields.keys()}
    config = TrainerConfig(steps=steps, **({"sequences_per_step": 2, "learning_rate": 3e-3} | fields))
    return Trainer(DSparkObjective(_fresh(ids), LossConfig(**losses)), config, refs)


def test_training_lowers_every_loss(refs: list[SequenceRef]) -> None:
    reports = list(_trainer(refs, 30).run())
    first, last = reports[0], reports[-1]
    assert last.cross_entropy < 0.7 * first.cross_entropy
    assert last.distance < first.distance
    assert last.confidence < first.confidence
    assert last.expected_length > first.expected_length


@pytest.mark.parametrize(
    "fields", [{}, {"matrix_learning_rate": 2e-3, "tap_dropout": 0.2, "hidden_dropout": 0.1}]
)
def test_a_resumed_run_repeats_the_uninterrupted_one(
    fields: dict[str, float], refs: list[SequenceRef], tmp_path: Path
) -> None:
    whole = list(_trainer(refs, 6, **fields).run())
    first = _trainer(refs, 6, **fields)
    run = first.run()
    for _ in range(3):
        next(run)
    first.save(tmp_path / "state.pt")
    second = _trainer(refs, 6, **fields)
    second.restore(tmp_path / "state.pt")
    assert list(second.run()) == whole[3:]


def test_dropout_reaches_the_losses(refs: list[SequenceRef]) -> None:
    plain, dropped = (next(_trainer(refs, 5, tap_dropout=rate).run()) for rate in (0.0, 0.5))
    assert dropped.gradient_norm != plain.gradient_norm
    assert dropped.acceptance != plain.acceptance


def test_slices_do_not_change_the_step(refs: list[SequenceRef]) -> None:
    coarse = next(_trainer(refs, 5, slice_anchors=1000).run())
    fine = next(_trainer(refs, 5, slice_anchors=3).run())
    assert fine.cross_entropy == pytest.approx(coarse.cross_entropy, rel=1e-3)
    assert fine.gradient_norm == pytest.approx(coarse.gradient_norm, rel=2e-2)


def test_answers_too_short_to_anchor_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", [random_sequence(4, 3, taps=192, size=64)])
    with pytest.raises(ConfigError, match="two answer tokens"):
        _trainer(list_sequences(tmp_path / "a.safetensors"), 1)


@pytest.mark.parametrize("field", ["steps", "learning_rate", "decay_fraction"])
def test_a_bad_setting_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}.*-1"):
        TrainerConfig(**({"steps": 1} | {field: -1}))


def test_the_rate_warms_up_holds_and_decays_to_zero() -> None:
    config = TrainerConfig(steps=100, warmup_fraction=0.1, decay_fraction=0.5)
    shares = [rate_share(config, step) for step in range(101)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9:51] == pytest.approx([1.0] * 42)
    assert shares[75] == pytest.approx(0.5)
    assert shares[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in itertools.pairwise(shares[50:]))


def test_layers_start_as_the_targets(refs: list[SequenceRef]) -> None:
    drafter, decoder = _fresh(), golden_target().decoder
    source = golden_drafter("dspark_vanilla")  # any module with unfused names, for its keys
    assert drafter.layers[0].state_dict().keys() == source.layers[0].state_dict().keys()
    q, k, v = (getattr(drafter.layers[1].self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj"))
    fused = {name: value for name, value in decoder.state_dict().items() if name.startswith("layers.7.")}
    torch.testing.assert_close(torch.cat((q, k, v)), fused["layers.7.self_attn.qkv_proj.weight"])
    assert drafter.markov_head is not None
    assert not bool(drafter.markov_head.markov_w2.weight.any())


def test_the_draft_vocabulary_keeps_frequent_and_named_tokens(tmp_path: Path) -> None:
    frequent = random_sequence(400, 2)
    frequent.token_ids[:] = torch.tensor([40, 41] * 200)
    write_shard(tmp_path / "a.safetensors", [frequent])
    ids = choose_draft_vocab([tmp_path / "a.safetensors"], 50, 6, always=(49,)).tolist()
    assert ids == sorted(ids)
    assert {40, 41, 49} <= set(ids)
    assert set(ids) - {40, 41, 49} == {0, 1, 2}  # never seen: the earliest merges


@pytest.mark.parametrize("name", ["dspark_vanilla", "dflash"])
def test_replayed_rounds_are_those_of_real_greedy_decoding(name: str) -> None:
    drafter, sequences, rounds, committed = golden_drafter(name), [], 0, 0
    for row in golden(name)["generation"]:
        output, real = decode_greedily(drafter, row["prompt"])
        # A replay ends with the answer, so rounds past its last token never happen there.
        sequences.append(greedy_sequence(output, len(row["prompt"])))
        remaining = len(output) - len(row["prompt"]) - 1
        for one in real:
            if remaining > 0:
                rounds, committed = rounds + 1, committed + min(one.accepted + 1, remaining)
                remaining -= one.accepted + 1
    found = replay_greedy_rounds(drafter, sequences, batch_size=2)
    assert (found.rounds, found.committed) == (rounds, committed)
    assert found.accepted_length == pytest.approx(committed / rounds)


def test_expected_length_multiplies_acceptance() -> None:
    report = StepReport(1, 0.0, 0.0, 0.0, (0.5, 0.5, 0.0), 0.1, 1.0)
    assert report.expected_length == pytest.approx(1.75)
