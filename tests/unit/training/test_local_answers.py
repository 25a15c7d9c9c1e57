"""The target answers in this process: many at once, and again the same."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.errors import ConfigError
from dspark_core.records import FinishReason, SamplingParams
from dspark_core.training.data.answer_log import Answer, AnswerLog, read_settings
from dspark_core.training.data.generation import BatchGenerator, Failure, Generated, Job
from dspark_core.training.data.local_answers import (
    AnswerSettings,
    LocalAnswers,
)
from dspark_core.training.data.magpie import (
    Synthesiser,
    SynthesisSettings,
    TurnJournal,
    begun_chunk_turns,
    synthesise,
    user_header,
)
from dspark_core.training.data.prompt_filters import PromptFilter
from dspark_core.training.data.prompts import Prompt, user_prompt
from dspark_core.training.data.sampling_mix import SamplingMix
from tests.support.byte_tokenizer import END, byte_tokenizer
from tests.unit.models.dspark_golden import golden_target, run_target

TOKENIZER = byte_tokenizer()
SETTINGS = AnswerSettings(
    mix=SamplingMix(temperatures=((0.0, 0.5), (1.0, 0.5)), seed=7), max_tokens=10, chunk_prompts=4
)


def engine(num_pages: int = 64) -> TargetEngine:
    target = golden_target()
    return TargetEngine.of_decoder(target.decoder, target.config, num_pages=num_pages, max_context_tokens=60)


def generator(concurrency: int = 3) -> BatchGenerator:
    return BatchGenerator(engine(), (END,), concurrency=concurrency)


def prompts(count: int) -> list[Prompt]:
    return [user_prompt(f"q{number}", domain="chat", source="mine") for number in range(count)]


def answered(asked: list[Prompt], done: set[str]) -> dict[str, Answer]:
    results = LocalAnswers(generator(), TOKENIZER, SETTINGS).run(asked, done.__contains__)
    return {one.prompt_id: one for one in results if isinstance(one, Answer)}


def test_greedy_jobs_get_the_targets_own_tokens() -> None:
    asked = {str(n): tuple(range(5 + n, 12 + n)) for n in range(7)}
    jobs = [
        Job(key=key, prompt_ids=ids, sampling=SamplingParams(temperature=0, seed=0), max_tokens=4 + int(key))
        for key, ids in asked.items()
    ]
    results = list(generator().run(jobs))
    assert {one.key for one in results} == asked.keys()
    for one in results:
        assert isinstance(one, Generated)
        assert (len(one.token_ids), one.finish) == (4 + int(one.key), FinishReason.LENGTH)
        ids = [*asked[one.key], *one.token_ids]
        hidden = run_target(ids, ()).hidden[len(asked[one.key]) - 1 : -1]
        assert golden_target().decoder.logits(hidden).argmax(dim=-1).tolist() == list(one.token_ids)


def test_a_prompt_beyond_the_context_fails_alone() -> None:
    sampling = SamplingParams(temperature=0, seed=0)
    jobs = [Job(key=str(n), prompt_ids=(1,) * n, sampling=sampling, max_tokens=2) for n in (59, 60)]
    results = {one.key: one for one in generator().run(jobs)}
    assert isinstance(results["59"], Generated)
    assert isinstance(results["60"], Failure)
    assert "60 tokens" in results["60"].problem
    with pytest.raises(ConfigError, match="concurrency must be >= 1, got 0"):
        generator(0)


@pytest.mark.parametrize("already", [0, 1, 5, 9])
def test_what_is_missing_is_answered_as_it_would_have_been(already: int) -> None:
    asked = prompts(10)
    whole = answered(asked, set())
    assert len(whole) == 10
    done = {prompt.prompt_id for prompt in asked[:already]}
    assert answered(asked, done) == {key: one for key, one in whole.items() if key not in done}


def test_nothing_is_generated_when_only_impossible_prompts_are_left() -> None:
    asked = [*prompts(3), user_prompt("x" * 60, domain="", source="")]
    results = list(LocalAnswers(generator(), TOKENIZER, SETTINGS).run(asked, lambda _: False))
    [failure] = [one for one in results if isinstance(one, Failure)]
    assert failure.key == asked[-1].prompt_id
    assert "the limit is 59" in failure.problem
    told: list[int] = []
    done = {one.prompt_id for one in results if isinstance(one, Answer)}
    again = LocalAnswers(generator(), TOKENIZER, SETTINGS).run(asked, done.__contains__, told.append)
    assert list(again) == [failure]
    assert told == []


def answer(prompt_id: str) -> Answer:
    return Answer(
        prompt_id=prompt_id,
        domain="",
        source="",
        sampling=SamplingParams(temperature=0, seed=1),
        finish=FinishReason.STOP,
        prompt_ids=(1,),
        answer_ids=(2, 3),
    )


def test_a_log_goes_on_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path, {"seed": 1}) as log:
        log.append(answer("a"))
        log.append(answer("b"))
    whole = path.read_bytes()
    for cut in (1, 10, 60):
        path.write_bytes(whole[:-cut])
        with AnswerLog(path, {"seed": 1}) as log:
            assert log.done == {"a"}
            log.append(answer("b"))
        assert path.read_bytes() == whole
    assert read_settings(path) == {"seed": 1}


def test_a_log_of_other_settings_or_another_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path, {"seed": 1, "top_p": 0.9}) as log:
        log.append(answer("a"))
        with pytest.raises(ConfigError, match=r"another process is writing .*answers\.jsonl"):
            AnswerLog(path, {"seed": 1, "top_p": 0.9})
    with pytest.raises(ConfigError, match="other settings \\(seed 1, not 2\\)"):
        AnswerLog(path, {"seed": 2, "top_p": 0.9})
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ConfigError, match=r"answers\.jsonl:1 is not an answer"):
        AnswerLog(path, {"seed": 1, "top_p": 0.9})


def all_turns() -> PromptFilter:
    return PromptFilter(count_tokens=lambda _: 9)


def test_turns_are_written_after_the_bare_header_of_a_user(tmp_path: Path) -> None:
    assert TOKENIZER.decode(user_header(TOKENIZER)) == "user\n"
    with pytest.raises(ConfigError, match="needs a target with a chat template"):
        user_header(byte_tokenizer(chat_template=None))

    settings = SynthesisSettings(max_tokens=12, chunk_turns=8, temperature=1.5)
    # Every other token ends a turn: a random model would hardly write the one that really does.
    free = BatchGenerator(engine(), tuple(range(0, 512, 2)), concurrency=3)
    told: list[int] = []
    synthesiser = Synthesiser(free, TOKENIZER, settings, told.append)
    journal = TurnJournal(tmp_path / "turns.jsonl", settings, "f0")
    first = list(islice(synthesise(synthesiser, journal, all_turns()), 9))
    assert len({prompt.text for prompt in first}) > 1
    assert told

    lines = (tmp_path / "turns.jsonl").read_text()
    (tmp_path / "turns.jsonl").write_text(lines[:-3])  # killed while the last chunk was written
    again = TurnJournal(tmp_path / "turns.jsonl", settings, "f0")
    assert len(again.chunks) == len(journal.chunks) - 1
    assert list(islice(synthesise(synthesiser, again, all_turns()), 9)) == first
    assert (tmp_path / "turns.jsonl").read_text() == lines
    with pytest.raises(ConfigError, match="begun with other settings"):
        TurnJournal(tmp_path / "turns.jsonl", settings, "f1")


def test_a_target_that_never_ends_a_turn_is_no_endless_work(tmp_path: Path) -> None:
    settings = SynthesisSettings(max_tokens=2, chunk_turns=2)
    synthesiser = Synthesiser(BatchGenerator(engine(), ()), TOKENIZER, settings)
    with pytest.raises(ConfigError, match="ends no turn"):
        list(synthesise(synthesiser, TurnJournal(tmp_path / "turns.jsonl", settings, "f0"), all_turns()))


class Repeating:
    """Stands for a target at temperature 0."""

    def chunk(self, number: int) -> list[str]:
        return ["What is the capital of France?"] * 4


def test_turns_that_are_all_refused_are_no_endless_work(tmp_path: Path) -> None:
    settings = SynthesisSettings(temperature=0.0, chunk_turns=4)
    found = synthesise(Repeating(), TurnJournal(tmp_path / "turns.jsonl", settings, "f0"), all_turns())
    assert next(found).text == "What is the capital of France?"
    with pytest.raises(
        ConfigError, match=r"no turn of the last 8 chunks \(so far kept: 1; refused: 35 repeated"
    ):
        next(found)


def test_asking_for_more_goes_on_in_chunks_of_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    assert begun_chunk_turns(path) is None
    TurnJournal(path, SynthesisSettings(chunk_turns=48), "f0")
    assert begun_chunk_turns(path) == 48
    path.write_text("nothing of a journal\n")
    assert begun_chunk_turns(path) is None
