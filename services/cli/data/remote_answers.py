"""Turns the text that a server answers into the token ids that training needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dspark_core.errors import ConfigError
from dspark_core.records import FinishReason
from dspark_core.tokenization.tokenizer import Tokenizer
from dspark_core.training.data.answer_log import Answer
from dspark_core.training.data.generation import Failure
from dspark_core.training.data.local_answers import AnswerSettings, Encoded, encode
from dspark_core.training.data.prompts import Prompt
from services.cli.data.openai_endpoint import OpenAIEndpoint, Question, Reply

_MARK = "ANSWER-CONTENT"
_ANY_LENGTH = 2**31


class RemoteAnswers:
    """Tokenizes with the target's own tokenizer, which must be the one the server uses."""

    def __init__(self, endpoint: OpenAIEndpoint, tokenizer: Tokenizer, settings: AnswerSettings) -> None:
        """Raises ConfigError when the target has no chat template to render prompts with."""
        self._endpoint = endpoint
        self._tokenizer = tokenizer
        self._settings = settings
        self._end = end_of_turn(tokenizer)

    async def run(self, prompts: Sequence[Prompt], on_result: Callable[[Answer | Failure], None]) -> None:
        """Raises UnavailableError if the server stops answering."""
        asked: dict[str, Encoded] = {}

        def questions() -> Iterator[Question]:
            for prompt in prompts:
                one = encode(prompt, self._tokenizer, _ANY_LENGTH)
                if isinstance(one, Failure):
                    on_result(one)
                    continue
                asked[prompt.prompt_id] = one
                yield self._question(prompt)

        def handle(result: Reply | Failure) -> None:
            one = asked.pop(result.key)
            on_result(result if isinstance(result, Failure) else self._answer(one, result))

        await self._endpoint.run(questions(), handle)

    def _question(self, prompt: Prompt) -> Question:
        return Question(
            key=prompt.prompt_id,
            messages=prompt.chat(),
            sampling=self._settings.mix.sampling_of(prompt.prompt_id),
            max_tokens=self._settings.max_tokens,
        )

    def _answer(self, asked: Encoded, reply: Reply) -> Answer:
        answer_ids = self._tokenizer.encode(reply.text, add_special_tokens=False)
        if reply.finish is FinishReason.STOP:
            answer_ids = (*answer_ids, self._end)
        return asked.answer(answer_ids, reply.finish, self._settings.mix)


def end_of_turn(tokenizer: Tokenizer) -> int:
    """The stop token that the chat template puts after an answer. Raises ConfigError if there is none."""
    if not tokenizer.has_chat_template:
        raise ConfigError("--endpoint needs a target with a chat template; this one has none")
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    text = tokenizer.render_chat(messages, add_generation_prompt=False)
    after = tokenizer.encode(text.partition(_MARK)[2], add_special_tokens=False)
    ends = [token for token in after if token in tokenizer.stop_token_ids]
    if not ends:
        raise ConfigError("--endpoint: the target's chat template does not end an answer with a stop token")
    return ends[0]
