"""Prompts are read from every usual shape, and what may not be trained on is kept out."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from dspark_core.errors import ConfigError
from dspark_core.tokenization.message_rows import Message
from dspark_core.training.data.conversations import read_conversations
from dspark_core.training.data.hub import read_dataset
from dspark_core.training.data.prompt_filters import (
    RUN_WORDS,
    Exclusions,
    LengthLimits,
    PromptFilter,
    Refusal,
)
from dspark_core.training.data.prompts import Prompt, read_prompts, user_prompt
from dspark_core.training.data.sampling_mix import SamplingMix, parse_temperatures

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
WORDS = [f"word{number}" for number in range(40)]


def rows(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi"}, ["Hi"]),
        ({"turns": ["Hi", "And then?"]}, ["Hi"]),
        ({"messages": [USER, ANSWER]}, ["Hi"]),
        ({"messages": [USER, ANSWER, USER]}, ["Hi", "Hello", "Hi"]),
        ({"messages": [{"role": "system", "content": "Be kind"}, USER]}, ["Be kind", "Hi"]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, ["Hi"]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]}, ["Hi"]),
        ({"messages": [USER, {"role": "assistant", "content": None}, {"role": "tool"}]}, ["Hi"]),
    ],
)
def test_rows_of_every_shape_end_with_the_user(row: dict, expected: list[str], tmp_path: Path) -> None:
    [prompt] = read_prompts(rows(tmp_path / "p.jsonl", row | {"domain": "chat", "source": "mine"}))
    assert [message.content for message in prompt.messages] == expected
    assert prompt.messages[-1].role == "user"
    assert (prompt.domain, prompt.source) == ("chat", "mine")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"id": "x", "text": "Hi"}, "has no turns .*its fields are: id, text"),
        ({"turns": []}, "'turns' must be a non-empty list, got \\[\\]"),
        ({"turns": [3]}, "first of 'turns' must be a non-empty text, got 3"),
        ({"prompt": "  "}, "'prompt' must be a non-empty text"),
        ({"messages": [ANSWER]}, "holds no message of a user"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role must be one of .*, got 'tool'"),
        (["Hi"], "must be an object .*, got list"),
        ({"messages": [{"role": "tool"}, USER]}, "role must be one of .*, got 'tool'"),
        ({"prompt": "half \ud83d"}, r"'prompt' holds the lone surrogate '\\ud83d' at character 5"),
    ],
)
def test_a_row_without_turns_names_file_and_line(row: object, problem: str, tmp_path: Path) -> None:
    path = rows(tmp_path / "p.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(ConfigError, match=rf"p\.jsonl:2.*{problem}"):
        list(read_prompts(path))


def test_a_line_that_is_no_json_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n\n{"prompt": \n', encoding="utf-8")
    prompts = read_prompts(path)
    assert next(prompts).text == "a\u2028b"
    with pytest.raises(ConfigError, match=r"p\.jsonl:3 is not valid JSON"):
        next(prompts)


def test_a_line_that_is_nested_too_deeply_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": ' + 100_000 * "[", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"p\.jsonl:1 is nested too deeply"):
        list(read_prompts(path))
    with pytest.raises(ConfigError, match=r"p\.jsonl:1: not a conversation"):
        list(read_conversations(path))


def test_written_prompts_read_back(tmp_path: Path) -> None:
    one = user_prompt("Hi", domain="chat", source="mine")
    two = Prompt(prompt_id="x", messages=(Message("system", "s"), Message("user", "é\u2028")), domain="math")
    path = tmp_path / "p.jsonl"
    path.write_text(one.line() + two.line(), encoding="utf-8")
    assert list(read_prompts(path)) == [one, two]


def filtered(texts: list[str], **options: object) -> tuple[list[str], PromptFilter]:
    chosen = PromptFilter(count_tokens=lambda text: len(text.split()), **options)
    return [p.text for p in chosen.keep(user_prompt(t, domain="", source="") for t in texts)], chosen


def test_repeated_short_and_long_prompts_are_refused_and_counted() -> None:
    limits = LengthLimits(min_tokens=2, max_tokens=4)
    kept, chosen = filtered(["One two", "one  TWO ", "one", "a b c d", "a b c d e"], limits=limits)
    assert kept == ["One two", "a b c d"]
    assert chosen.refused == {Refusal.REPEATED: 1, Refusal.TOO_SHORT: 1, Refusal.TOO_LONG: 1}
    with pytest.raises(ConfigError, match="got 5 and 4"):
        LengthLimits(min_tokens=5, max_tokens=4)


def test_a_run_of_thirteen_words_is_one_too_many() -> None:
    benchmark = Exclusions([" ".join(WORDS), "What is 2 + 2?"])
    twelve, thirteen = WORDS[5 : 4 + RUN_WORDS], WORDS[5 : 5 + RUN_WORDS]
    assert not benchmark.match("before " + " ".join(twelve) + " after")
    assert benchmark.match("before, " + "; ".join(thirteen).upper() + "! after")
    assert benchmark.match("what is 2+2")
    assert not benchmark.match("what is 2+2 and 3+3")


def test_files_that_number_their_rows_alike_end_up_with_unique_ids() -> None:
    prompts = [Prompt(prompt_id="0", messages=(Message("user", text),)) for text in ("a", "b", "c")]
    chosen = PromptFilter(count_tokens=lambda _: 9)
    assert [p.prompt_id for p in chosen.keep(prompts)] == ["0", "0-2", "0-3"]


def test_a_dataset_is_read_row_by_row(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows(tmp_path / "train.jsonl", {"prompt": "Hi", "topic": "greeting"}, {"prompt": "Bye", "topic": "end"})
    prompts = list(read_dataset(str(tmp_path), limit=1))
    assert [(p.text, p.source) for p in prompts] == [("Hi", str(tmp_path))]
    assert [p.text for p in read_dataset(str(tmp_path), column="topic")] == ["greeting", "end"]
    with pytest.raises(ConfigError, match="row 1 has no 'question'; its fields are: prompt, topic"):
        list(read_dataset(str(tmp_path), column="question"))
    with pytest.raises(ConfigError, match=r"cannot be read: .*is the name right"):
        list(read_dataset(str(tmp_path / "nothing")))


def test_a_saved_dataset_is_read_by_its_own_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one, two = (datasets.Dataset.from_list([{"prompt": text}]) for text in ("Hi", "Bye"))
    datasets.DatasetDict({"train_sft": one, "train_gen": two}).save_to_disk(tmp_path / "both")
    two.save_to_disk(tmp_path / "one")
    assert [p.text for p in read_dataset(str(tmp_path / "both"), split="train_sft")] == ["Hi"]
    assert [p.text for p in read_dataset(str(tmp_path / "one"))] == ["Bye"]
    with pytest.raises(ConfigError, match="has no split 'train'; its splits are: train_sft, train_gen"):
        list(read_dataset(str(tmp_path / "both")))


def test_a_missing_library_is_named(monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    with pytest.raises(ConfigError, match=r"needs the package datasets: pip install 'dspark\[data\]'"):
        list(read_dataset("anything"))


def test_a_mixture_keeps_its_shares_and_depends_on_the_key_alone() -> None:
    mix = SamplingMix(temperatures=parse_temperatures("0:0.6,0.2:0.3,0.7:0.1"), top_p=0.9, seed=4)
    keys = [f"prompt-{number}" for number in range(4000)]
    drawn = {key: mix.sampling_of(key) for key in keys}
    for temperature, share in mix.temperatures:
        found = sum(sampling.temperature == temperature for sampling in drawn.values())
        assert found / len(keys) == pytest.approx(share, abs=0.03)
    random.Random(1).shuffle(keys)
    assert {key: mix.sampling_of(key) for key in keys} == drawn
    assert len({sampling.seed for sampling in drawn.values()}) == len(keys)
    other = SamplingMix(temperatures=mix.temperatures, seed=5)
    assert other.sampling_of("prompt-0").seed != drawn["prompt-0"].seed


@pytest.mark.parametrize("text", ["", "warm", "0:", "0:0", "0:-1", "0.2:nan", "0:1,,"])
def test_wrong_mixtures_are_refused_by_name(text: str) -> None:
    if text == "0:":
        assert parse_temperatures(text) == ((0.0, 1.0),)
        return
    with pytest.raises(ConfigError, match="--temperatures"):
        parse_temperatures(text)


def test_an_impossible_temperature_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"temperature must be in \[0, 100\], got -1"):
        SamplingMix(temperatures=parse_temperatures("-1"))
