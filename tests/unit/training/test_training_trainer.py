"""The trainer learns, resumes exactly, and starts from the target's weights."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.models.config import DrafterConfig
from dspark_core.models.drafter_checkpoint import load_drafter
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.training.checkpoints import Checkpoints
from dspark_core.training.features import write_shard
from dspark_core.training.initial import choose_draft_vocab, new_drafter
from dspark_core.training.objectives.dspark import DSparkObjective
from dspark_core.training.optimizers import rate_share
from dspark_core.training.recipe import LossConfig
from dspark_core.training.sources import CachedSource
from dspark_core.training.trainer import StepReport, Trainer
from dspark_core.training.trainer_config import TrainerConfig
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
def source(tmp_path_factory: pytest.TempPathFactory) -> CachedSource:
    shard = tmp_path_factory.mktemp("shards") / "a.safetensors"
    rows = [golden("dspark_vanilla")["generation"][i] for i in range(3)]
    write_shard(shard, [greedy_sequence(row["output"], len(row["prompt"])) for row in rows])
    return CachedSource([shard])


def _trainer(source: CachedSource, steps: int, **fields) -> Trainer:
    ids = torch.arange(0, 512, 2).sort().values
    losses = {"anchors_per_sequence": 8, "slice_anchors": 5}
    names = {field.name for field in dataclasses.fields(LossConfig)}
    losses |= {name: fields.pop(name) for name in names & fields.keys()}
    config = TrainerConfig(steps=steps, **({"sequences_per_step": 2, "learning_rate": 3e-3} | fields))
    return Trainer(DSparkObjective(_fresh(ids), LossConfig(**losses)), config, source)


def test_training_lowers_every_loss(source: CachedSource) -> None:
    reports = list(_trainer(source, 30).run())
    first, last = reports[0], reports[-1]
    assert last.cross_entropy < 0.7 * first.cross_entropy
    assert last.distance < first.distance
    assert last.confidence < first.confidence
    assert last.expected_length > first.expected_length


@pytest.mark.parametrize(
    "fields",
    [{}, {"matrix_learning_rate": 2e-3, "tap_dropout": 0.2, "hidden_dropout": 0.1, "ema_decay": 0.9}],
)
def test_a_resumed_run_repeats_the_uninterrupted_one(
    fields: dict[str, float], source: CachedSource, tmp_path: Path
) -> None:
    uninterrupted = _trainer(source, 6, **fields)
    reports = list(uninterrupted.run())
    first = _trainer(source, 6, **fields)
    run = first.run()
    for _ in range(3):
        next(run)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(first.step, first.state())
    run.close()
    second = _trainer(source, 6, **fields)
    second.restore(checkpoints.load(checkpoints.latest()))
    assert list(second.run()) == reports[3:]
    for kind in ("masters", "averages"):
        for name, value in (uninterrupted.state()[kind] or {}).items():
            assert torch.equal(value, second.state()[kind][name])


def test_dropout_reaches_the_losses(source: CachedSource) -> None:
    plain, dropped = (next(_trainer(source, 5, tap_dropout=rate).run()) for rate in (0.0, 0.5))
    assert dropped.gradient_norm != plain.gradient_norm
    assert dropped.acceptance != plain.acceptance


def test_slices_do_not_change_the_step(source: CachedSource) -> None:
    coarse = next(_trainer(source, 5, slice_anchors=1000).run())
    fine = next(_trainer(source, 5, slice_anchors=3).run())
    assert fine.cross_entropy == pytest.approx(coarse.cross_entropy, rel=1e-3)
    assert fine.gradient_norm == pytest.approx(coarse.gradient_norm, rel=2e-2)


def test_answers_too_short_to_anchor_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", [random_sequence(4, 3, taps=192, size=64)])
    with pytest.raises(ConfigError, match="2 answer tokens"):
        CachedSource([tmp_path / "a.safetensors"])


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


def test_layers_start_as_the_targets(source: CachedSource) -> None:
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
    ids = choose_draft_vocab(
        CachedSource([tmp_path / "a.safetensors"]).token_counts(50), 6, always=(49,)
    ).tolist()
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


@pytest.mark.parametrize(
    ("size", "always", "named"), [(1, (3, 4), "got 1"), (51, (), "got 51"), (5, (50,), "got 50")]
)
def test_a_draft_vocabulary_that_cannot_be_is_refused(size: int, always: tuple[int, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        choose_draft_vocab(torch.ones(50, dtype=torch.long), size, always)


def test_a_state_of_another_drafter_is_refused(source: CachedSource) -> None:
    other = Trainer(DSparkObjective(_fresh(), LossConfig()), TrainerConfig(steps=1), source)
    with pytest.raises(CheckpointError, match=r"markov_w2.*\(512, 8\).*\(256, 8\)"):
        _trainer(source, 1).restore(other.state())


def test_a_state_is_taken_up_at_new_rates_but_not_by_another_optimiser(source: CachedSource) -> None:
    first = _trainer(source, 4)
    next(first.run())
    faster = _trainer(source, 4, learning_rate=6e-3)
    faster.restore(first.state())
    assert next(faster.run()).learning_rate == pytest.approx(2 * next(first.run()).learning_rate)
    moved = [trainer.state()["masters"]["norm.weight"] for trainer in (first, faster)]
    assert not torch.equal(*moved)
    with pytest.raises(CheckpointError, match="matrix_learning_rate"):
        _trainer(source, 4, matrix_learning_rate=1e-3).restore(first.state())


def test_the_exported_average_lags_behind_the_weights(source: CachedSource, tmp_path: Path) -> None:
    trainer = _trainer(source, 4, ema_decay=0.9)
    list(trainer.run())
    before = trainer.state()
    trainer.export(tmp_path)
    target = golden_target()
    exported = load_drafter(
        tmp_path,
        target.decoder.embed_tokens.weight,
        target.decoder.lm_head.weight,
        target.config,
        torch.bfloat16,
    )
    for name, value in exported.named_parameters():
        assert torch.equal(value, before["averages"][name].bfloat16())
        assert torch.equal(trainer.state()["masters"][name], before["masters"][name])
    assert any(
        not torch.equal(a, b)
        for a, b in zip(before["averages"].values(), before["masters"].values(), strict=True)
    )


def test_only_the_last_states_are_kept_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 200):
        checkpoints.save(step, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010.pt", "step-00000200.pt"]
    latest = checkpoints.latest()
    assert latest is not None
    assert checkpoints.load(latest) == {"step": 200}
    latest.write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"step-00000200\.pt"):
        checkpoints.load(latest)
