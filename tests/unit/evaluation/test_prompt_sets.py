"""Benchmark files: what is read, and what a wrong row's error says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspark_core.errors import ConfigError
from dspark_core.evaluation.prompt_sets import PromptRow, find_prompt_files, read_prompt_set
from dspark_core.tokenization.message_rows import Message


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return path


def asked(text: str) -> PromptRow:
    return PromptRow((Message("user", text),))


def test_the_first_turn_of_each_row_is_read(tmp_path: Path) -> None:
    rows = [{"id": "a", "turns": ["one", "two"]}, "", {"turns": ["line\u2028kept whole"]}]
    lines = [row if row == "" else json.dumps(row, ensure_ascii=False) for row in rows]
    found = read_prompt_set(write(tmp_path / "chat.jsonl", *lines))
    assert found.name == "chat"
    assert found.rows == (asked("one"), asked("line\u2028kept whole"))


def test_a_single_prompt_is_a_first_turn(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"id": "p", "prompt": "asked"}, {"prompt": "no", "turns": ["yes"]})
    assert read_prompt_set(path).rows == (asked("asked"), asked("yes"))


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"turns": ["one"]}, "not json")
    assert read_prompt_set(path, limit=1).rows == (asked("one"),)


def test_a_conversation_is_asked_up_to_the_users_last_message(tmp_path: Path) -> None:
    said = [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "And now?"},
    ]
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}
    (row,) = read_prompt_set(write(tmp_path / "x.jsonl", {"messages": [*said, calls]})).rows
    assert row.chat() == said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": "q", "question": "x"},
            r"has no turns \(prompt, turns, messages or conversations\); its fields are: id, question",
        ),
        ({"turns": []}, "non-empty list"),
        ({"turns": "x"}, "non-empty list"),
        ({"turns": [3]}, "non-empty text, got 3"),
        ({"turns": [" "]}, "non-empty text"),
        (["x"], "must be an object with prompt, turns, messages or conversations, got list"),
        ("{", "not valid JSON"),
        ('{"prompt": ' + 100_000 * "[", "nested too deeply"),
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, "no message of a user"),
        (
            {"messages": [{"role": "tool"}, {"role": "user", "content": "Hi"}]},
            "role must be one of human, gpt, user, assistant, system, got 'tool'",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "content must be a non-empty text, got null"),
        ({"prompt": "half \ud83d"}, r"'prompt' holds the lone surrogate '\\ud83d' at character 5"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"turns": ["fine"]}, row)
    with pytest.raises(ConfigError, match=message) as caught:
        read_prompt_set(path)
    assert str(caught.value).startswith(f"{path}:2")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "marked.jsonl"
    path.write_text('{"prompt": "Hi"}\n', encoding="utf-8-sig")
    assert read_prompt_set(path).rows[0].messages[-1].content == "Hi"


def test_directories_give_their_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        write(tmp_path / name, {"turns": ["x"]})
    assert [path.name for path in find_prompt_files([tmp_path])] == ["a.jsonl", "b.jsonl"]


def test_paths_that_cannot_be_evaluated_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    one, two = (write(tmp_path / d / "a.jsonl", {"turns": ["x"]}) for d in (".", "other"))
    with pytest.raises(ConfigError, match=r"missing\.jsonl not found"):
        find_prompt_files([tmp_path / "missing.jsonl"])
    with pytest.raises(ConfigError, match=r"holds no \.jsonl file"):
        find_prompt_files([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="two prompt files are named 'a'"):
        find_prompt_files([one, two])
    with pytest.raises(ConfigError, match="holds no rows"):
        read_prompt_set(write(tmp_path / "blank.jsonl", "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"turns": ["\xe9"]}')
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_prompt_set(tmp_path / "latin.jsonl")
