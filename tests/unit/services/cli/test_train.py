"""`dspark train` as a user meets it: a YAML file, a folder, kills, workers, and clear refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dspark_core.errors import ConfigError
from dspark_core.training.features import write_shard
from dspark_core.training.manifest import Manifest, ShardEntry, write_manifest
from dspark_core.training.objectives.registry import algorithm
from dspark_core.training.origin import FeatureOrigin
from dspark_core.training.run_log import read_log
from dspark_core.training.stream import FeatureStream
from dspark_core.training.workers import ALONE
from services.cli.drafters import train_setup
from services.cli.drafters.train_config import read_config
from services.cli.drafters.train_setup import build_setup, loss_config
from services.common.exits import EXIT_CONFIG
from tests.unit.models.dspark_golden import golden_target
from tests.unit.services.cli.tiny_training import STEPS, train, write_config
from tests.unit.training.answer_files import write_answers
from tests.unit.training.training_sequences import random_sequence


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def _state(run: Path, step: int) -> dict:
    return torch.load(run / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)["trainer"]


def _describe_shards(shard: Path, **fields: object) -> None:
    """The manifest of one shard of the golden target's features, but for the given fields."""
    described = {
        "target": "other-model",
        "fingerprint": golden_target().fingerprint,
        "vocab_size": 512,
        "hidden_size": 64,
        "tap_layers": (1, 3, 5),
        "dtype": "bfloat16",
        "chat_template": "",
    }
    origin = FeatureOrigin(**(described | fields))
    entry = ShardEntry(sha256="", bytes=shard.stat().st_size, sequences=8, tokens=192)
    write_manifest(
        shard.parent, Manifest(origin=origin, answers_sha256="", planned_shards=1, shards={shard.name: entry})
    )


def _command(*module: str) -> list[str]:
    return [sys.executable, *module]


def test_a_killed_run_resumes_to_the_same_weights(config: Path, tmp_path: Path) -> None:
    constant = [
        "--set",
        "optimisation.warmup=0",
        "--set",
        "optimisation.decay=0",
    ]  # of how many steps there are
    assert train(config, *constant) == 0
    killed = tmp_path / "killed"
    elsewhere = [*constant, "--set", f"output.directory={killed}"]
    endless = ["train", "--config", str(config), *elsewhere, "--set", "optimisation.steps=1000000"]
    process = subprocess.Popen(_command("-m", "services.cli.main", *endless), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(killed.glob("checkpoints/step-*.pt")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    for path in killed.glob("checkpoints/step-*.pt"):
        if path.stem > f"step-{STEPS - 2:08d}":  # a slow kill must not leave nothing to resume
            path.unlink()
    assert train(config, *elsewhere, "--resume") == 0
    straight, resumed = _state(tmp_path / "run", STEPS), _state(killed, STEPS)
    for kind in ("masters", "averages"):
        assert all(torch.equal(value, resumed[kind][name]) for name, value in straight[kind].items())
    assert [row["step"] for row in read_log(killed / "log.jsonl")] == list(range(1, STEPS + 1))


# One of each kind: the names of weights in files and in memory differ.
@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3", "mtp1"])
def test_a_trained_drafter_is_gone_on_from(config: Path, tmp_path: Path, kind: str) -> None:
    """Its weights and its draft vocabulary, whatever the new data's most frequent tokens are."""
    one_step = ["--set", f"drafter.algorithm={kind}", "--set", "optimisation.steps=1"]
    assert train(config, *one_step) == 0
    saved = tmp_path / "run" / "drafter"
    others = tmp_path / "others"
    others.mkdir()
    rows = [random_sequence(24, 4, taps=192, size=64, seed=50 + i) for i in range(8)]
    rows = [replace(row, token_ids=511 - row.token_ids) for row in rows]  # others are frequent
    write_shard(others / "a.safetensors", rows)
    again = ["--set", f"data.shards=[{others}]", "--set", f"output.directory={tmp_path / 'again'}"]
    still = ["--set", "optimisation.learning_rate=1e-30", "--set", "optimisation.matrix_learning_rate=null"]
    start = ["--set", f"drafter.start_from={saved}", "--set", "drafter.draft_vocab=null"]
    assert train(config, *one_step, *again, *still, *start) == 0
    was, now = load_file(saved / "model.safetensors"), load_file(tmp_path / "again/drafter/model.safetensors")
    assert was.keys() == now.keys()
    for name, value in was.items():
        assert torch.equal(now[name], value), name


def test_a_start_that_does_not_fit_is_refused_with_both_values(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, "--set", "optimisation.steps=1") == 0
    saved, elsewhere = tmp_path / "run" / "drafter", ["--set", f"output.directory={tmp_path / 'again'}"]
    start = [*elsewhere, "--set", f"drafter.start_from={saved}"]
    for change, told in {
        "drafter.layers=2": "num_layers 1, this run 2",
        "drafter.markov_rank=4": "markov_rank 8, this run 4",
        "drafter.tap_layers=[1, 2, 5]": "target_layer_ids (1, 3, 5), this run (1, 2, 5)",
        "drafter.draft_vocab=32": "drafter.draft_vocab is 32",
        "drafter.algorithm=mtp1": "holds a DSparkDrafter, this run trains a MtpDrafter",
        "drafter.start_from=nowhere": "drafter.start_from: drafter 'nowhere' not found",
    }.items():
        assert train(config, *start, "--set", change) == EXIT_CONFIG
        assert told in capsys.readouterr().err
    assert not (tmp_path / "again" / "checkpoints").exists()


def _train_in_two(config: Path, *arguments: str) -> None:
    workers = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    done = subprocess.run(
        _command(*workers, "services.cli.main", "train", "--config", str(config), *arguments),
        capture_output=True,
        text=True,
        timeout=250,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def test_two_workers_do_what_one_does(config: Path, tmp_path: Path) -> None:
    """They resume from one worker's checkpoint, and end at the same losses and weights."""
    assert train(config) == 0
    pair = tmp_path / "pair"
    (pair / "checkpoints").mkdir(parents=True)
    for name in ("draft_vocab.pt", "config.json", "checkpoints/step-00000004.pt"):
        shutil.copy(tmp_path / "run" / name, pair / name)
    _train_in_two(config, "--resume", "--set", f"output.directory={pair}")
    alone = {row["step"]: row for row in read_log(tmp_path / "run/log.jsonl")}
    rows = read_log(pair / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(5, STEPS + 1))
    for row in rows:
        for name in ("cross_entropy", "distance", "confidence", "gradient_norm", "learning_rate"):
            assert row[name] == pytest.approx(alone[row["step"]][name], rel=1e-4)
    one, two = _state(tmp_path / "run", STEPS), _state(pair, STEPS)
    for kind in ("masters", "averages"):
        for name, value in one[kind].items():
            # Muon iterates in bfloat16: the order of a sum shows. Steps are a hundred times larger.
            torch.testing.assert_close(two[kind][name], value, rtol=1e-2, atol=1e-4)


def test_two_workers_export_without_disturbing_each_other(config: Path, tmp_path: Path) -> None:
    """Without averages nothing else has the second wait for the first, who alone writes."""
    steps = ["--set", "optimisation.steps=60", "--set", "output.checkpoint_every=60"]
    _train_in_two(config, *steps, "--set", "optimisation.ema=null", "--set", "validation.every=1")
    assert sorted(path.name for path in (tmp_path / "run/drafter").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert not (tmp_path / "run/drafter.partial").exists()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, "--dry-run") == 0
    told = capsys.readouterr().out
    for word in ("trained parameters", "8 sequences, 192 tokens", "positions/s", "GB free", "estimated time"):
        assert word in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_missing_validation_prompts_are_refused_before_the_first_step(
    dry: list[str], config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = SimpleNamespace(vocab_size=512)  # all that is asked of it here
    monkeypatch.setattr(train_setup, "load_tokenizer", lambda *_: tokenizer)
    assert train(config, *dry, "--set", "validation.prompts=[nowhere.jsonl]") == EXIT_CONFIG
    told = capsys.readouterr()
    assert "prompt file nowhere.jsonl not found" in told.err
    assert "positions/s" not in told.out


def test_data_do_not_change_what_the_weights_of_a_run_mean(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of as many layers the weights fit, and so would a vocabulary of other tokens."""
    _describe_shards(tmp_path / "shards/a.safetensors")
    assert train(config, "--set", "optimisation.steps=2", "--set", "drafter.tap_layers=null") == 0
    others = tmp_path / "others"
    shutil.copytree(tmp_path / "shards", others)
    _describe_shards(others / "a.safetensors", tap_layers=(0, 2, 4))
    resume = ["--resume", "--set", "drafter.tap_layers=null", "--set", f"data.shards=[{others}]"]
    before = (tmp_path / "run/config.json").read_text()
    assert train(config, *resume) == EXIT_CONFIG
    assert "drafter.tap_layers: now [0, 2, 4], [1, 3, 5] in " in capsys.readouterr().err
    assert (tmp_path / "run/config.json").read_text() == before
    torch.save(torch.arange(100, 164), tmp_path / "run/draft_vocab.pt")
    assert train(config, "--resume", "--set", "drafter.tap_layers=null") == EXIT_CONFIG
    assert "drafter.draft_vocab: now '64 tokens, " in capsys.readouterr().err


def test_other_weights_at_the_target_s_path_are_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, "--set", "optimisation.steps=2") == 0
    load = train_setup.load_target
    monkeypatch.setattr(
        train_setup, "load_target", lambda *args, **more: replace(load(*args, **more), fingerprint="other")
    )
    assert train(config, "--resume") == EXIT_CONFIG
    assert "target.model: now 'weights other'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_length=10", r"data: max_length is for a stream; shards hold what they were made with"),
        (
            "drafter.gamma=7",
            r"drafter\.gamma is not a field, got 7; valid fields here: algorithm, always_tokens, ",
        ),
        (
            "optimisation.losses.l1=1",
            r"losses\.l1 is not a field, got 1; valid fields here: anchors, confidence",
        ),
        (
            "trainer.steps=3",
            r"trainer is not a field, got .*; valid fields here: data, drafter, optimisation",
        ),
        ("drafter.tap_layers=[]", r"drafter\.tap_layers: .*at least 1 item.*, got \[\]"),
        ("drafter.tap_layers=[1, 1]", r"drafter\.tap_layers: layers must differ, got \[1, 1\]"),
        ("drafter.moe.experts=3", r"drafter\.moe\.experts is not a field, got 3; valid .* num_experts"),
        ("optimisation.steps=-1", r"optimisation\.steps: .* greater than or equal to 1, got -1"),
        ("drafter.markov_head=lstm", r"drafter\.markov_head: .*'vanilla', 'gated' or 'rnn', got 'lstm'"),
        ("optimisation.seed=18446744073709551616", r"optimisation\.seed: .* less than .*, got 184467"),
        ("optimisation.epochs=2", "optimisation: give either steps or epochs"),
        ("data.stream=answers.jsonl", "data: give either shards or stream"),
        ("output.directory", "--set must be like"),
        ("output.directory.x=1", "directory is not a section"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_the_valid_ones(
    config: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(config, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("drafter.algorithm=medusa", "algorithm must be one of dflash, dspark, eagle3, mtp1, got 'medusa'"),
        ("drafter.mask_token=512", "mask_token must be below the target's vocab_size 512, got 512"),
        ("drafter.tap_layers=[1, 3]", "hold 192 tapped values per token; .* need 128"),
        ("drafter.draft_vocab=513", "draft_vocab_size must be in .*512.*, got 513"),
        ("drafter.source_layers=[1, 2]", "source_layers must name num_layers=1 layers"),
        ("data.shards=[nowhere]", "nowhere"),
        ("optimisation.device=warp", "optimisation.device: 'warp'"),
        ("output.keep=100000000", "GB are free"),
        ("drafter.markov_rank=65", "markov_rank must be at most 64, of the target's embedding, got 65"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    config: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, "--set", override) != 0
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 32000, "vocab_size 32000 .*this target has vocab_size 512"),
        (
            "fingerprint",
            "0123",
            "other-model with fingerprint 0123; this target has fingerprint [0-9a-f]{16}",
        ),
    ],
)
def test_features_of_another_target_are_refused_with_both_values(
    config: Path, field: str, value: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _describe_shards(tmp_path / "shards/a.safetensors", **{field: value})
    assert train(config) == EXIT_CONFIG
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def _stream(config: Path, answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains on these answers rather than on shards."""
    template = SimpleNamespace(chat_template="")  # all that is asked of the tokenizer, which golden has not
    monkeypatch.setattr(train_setup, "load_tokenizer", lambda _: template)
    document = yaml.safe_load(config.read_text())
    document["data"] = {"stream": str(answers)}
    config.write_text(yaml.safe_dump(document))


def test_a_stream_is_computed_where_the_drafter_trains(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the drafter starts from, and what validates, stays on the CPU."""
    _stream(config, write_answers(tmp_path / "answers.jsonl"), monkeypatch)
    computing: list[torch.device] = []

    class Observed(FeatureStream):
        def __init__(self, decoder, *arguments, **options) -> None:
            computing.append(decoder.embed_tokens.weight.device)
            super().__init__(decoder, *arguments, **options)

    monkeypatch.setattr(train_setup, "FeatureStream", Observed)
    # A device that every machine has.
    monkeypatch.setattr(train_setup, "own_device", lambda name: torch.device("meta"))
    setup = build_setup(read_config(config), ALONE)
    assert [device.type for device in computing] == ["meta"]
    assert setup.target.decoder.embed_tokens.weight.device.type == "cpu"


def test_streamed_answers_of_another_target_are_refused_with_both_values(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = write_answers(tmp_path / "answers.jsonl")
    _stream(config, answers, monkeypatch)
    settings = tmp_path / "answers.jsonl.settings.json"
    settings.write_text(json.dumps({"target": "other-model", "fingerprint": "0123"}))
    assert train(config, "--dry-run") == EXIT_CONFIG
    told = f"other-model with fingerprint 0123; .* has fingerprint {golden_target().fingerprint}"
    assert re.search(told, capsys.readouterr().err)
    settings.write_text(json.dumps({"target": "golden", "fingerprint": golden_target().fingerprint}))
    assert train(config, "--dry-run") == 0


@pytest.mark.parametrize("draft_vocab", ["64", "null"])  # found while counting, and by the pass
def test_a_streamed_token_that_the_target_does_not_have_is_refused(
    config: Path,
    draft_vocab: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = write_answers(tmp_path / "answers.jsonl")
    row = {"prompt_ids": [1, 2], "answer_ids": [3, 512, 4]}
    answers.write_text((json.dumps(row) + "\n") * 8)
    _stream(config, answers, monkeypatch)
    assert train(config, "--set", f"drafter.draft_vocab={draft_vocab}") == EXIT_CONFIG
    assert "token id 512 is outside the target's vocabulary of 512: the answers are of another target" in (
        capsys.readouterr().err
    )


def test_a_file_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    with pytest.raises(ConfigError, match=r"bad\.yaml cannot be read"):
        read_config(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not YAML"):
        read_config(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match=r"bad\.yaml must contain sections"):
        read_config(path)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[4] / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = read_config(path)
    assert loss_config(recipe, algorithm(recipe.drafter.algorithm).losses).anchors_per_sequence > 0
