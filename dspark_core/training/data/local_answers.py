"""Answers prompts with the target in this process; a resumed run produces the same bytes.

Prompts are answered in chunks. A chunk is always generated whole by a fresh generator run, so that
everything an answer's rounding depends on is the same in every run. A resumed run regenerates the chunk
it was killed in and writes only the missing answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dspark_core.errors import ConfigError, InvalidRequestError
from dspark_core.records import FinishReason
from dspark_core.tokenization.tokenizer import Tokenizer
from dspark_core.training.data.answer_log import Answer
from dspark_core.training.data.generation import BatchGenerator, Failure, Job
from dspark_core.training.data.prompts import Prompt
from dspark_core.training.data.recording import RecordedShards
from dspark_core.training.data.sampling_mix import SamplingMix

DEFAULT_CHUNK_PROMPTS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    mix: SamplingMix
    max_tokens: int = 512
    chunk_prompts: int = DEFAULT_CHUNK_PROMPTS

    def __post_init__(self) -> None:
        for name in ("max_tokens", "chunk_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Encoded:
    prompt: Prompt
    token_ids: tuple[int, ...]

    def answer(self, answer_ids: tuple[int, ...], finish: FinishReason, mix: SamplingMix) -> Answer:
        return Answer(
            prompt_id=self.prompt.prompt_id,
            domain=self.prompt.domain,
            source=self.prompt.source,
            sampling=mix.sampling_of(self.prompt.prompt_id),
            finish=finish,
            prompt_ids=self.token_ids,
            answer_ids=answer_ids,
        )


def encode(prompt: Prompt, tokenizer: Tokenizer, max_prompt_tokens: int) -> Encoded | Failure:
    """A Failure when the chat template rejects the conversation or the prompt is too long."""
    try:
        token_ids = tokenizer.encode_chat(prompt.chat())
    except InvalidRequestError as error:
        return Failure(key=prompt.prompt_id, problem=str(error))
    if len(token_ids) > max_prompt_tokens:
        problem = f"the prompt has {len(token_ids)} tokens; the limit is {max_prompt_tokens}"
        return Failure(key=prompt.prompt_id, problem=problem)
    return Encoded(prompt, token_ids)


class LocalAnswers:
    def __init__(
        self,
        generator: BatchGenerator,
        tokenizer: Tokenizer,
        settings: AnswerSettings,
        shards: RecordedShards | None = None,
    ) -> None:
        """`shards`: where features recorded during generation are written, one shard per chunk."""
        self._generator = generator
        self._tokenizer = tokenizer
        self._settings = settings
        self._shards = shards

    def run(
        self,
        prompts: Sequence[Prompt],
        done: Callable[[str], bool],
        on_generated: Callable[[int], None] = lambda _: None,
    ) -> Iterator[Answer | Failure]:
        """Answers to the prompts not yet `done`; `on_generated` gets the token count of each finished one."""
        size = self._settings.chunk_prompts
        for number, start in enumerate(range(0, len(prompts), size)):
            results = [self._encode(prompt) for prompt in prompts[start : start + size]]
            yield from (one for one in results if isinstance(one, Failure))
            chunk = [one for one in results if isinstance(one, Encoded)]
            recorded = self._shards is None or self._shards.has(number)
            if recorded and all(done(one.prompt.prompt_id) for one in chunk):
                continue
            yield from (a for a in self._answer(chunk, on_generated) if not done(_key(a)))
            if self._shards is not None:
                self._shards.write(number, [one.prompt.prompt_id for one in chunk])

    def _encode(self, prompt: Prompt) -> Encoded | Failure:
        return encode(prompt, self._tokenizer, self._generator.max_prompt_tokens)

    def _answer(
        self, chunk: Sequence[Encoded], on_generated: Callable[[int], None]
    ) -> Iterator[Answer | Failure]:
        asked = {one.prompt.prompt_id: one for one in chunk}
        for result in self._generator.run(_job(one, self._settings) for one in chunk):
            if isinstance(result, Failure):
                yield result
                continue
            on_generated(len(result.token_ids))
            yield asked[result.key].answer(result.token_ids, result.finish, self._settings.mix)


def _job(one: Encoded, settings: AnswerSettings) -> Job:
    return Job(
        key=one.prompt.prompt_id,
        prompt_ids=one.token_ids,
        sampling=settings.mix.sampling_of(one.prompt.prompt_id),
        max_tokens=settings.max_tokens,
    )


def _key(result: Answer | Failure) -> str:
    return result.prompt_id if isinstance(result, Answer) else result.key
