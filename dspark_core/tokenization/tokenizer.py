"""A model's tokenizer: text to ids, ids to text, conversations to prompts."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers

from dspark_core.errors import InvalidRequestError
from dspark_core.tokenization.chat_template import NO_ARGUMENTS, ChatTemplate
from dspark_core.tokenization.detokenizer import IncrementalDetokenizer
from dspark_core.tokenization.fewest_tokens import FewestTokens, fewest_tokens
from dspark_core.tokenization.thoughts import ThoughtMarks, thought_marks
from dspark_core.tokenization.token_bytes import token_bytes
from dspark_core.tokenization.tool_formats import ToolFormat
from dspark_core.tokenization.tool_style import ToolStyle, tool_style

_log = logging.getLogger(__name__)

# How chat formats end a turn. One of these stops generation when the model's own template writes it,
# even where the checkpoint names only its end-of-text token. So does the beginning of what a called tool
# returned, where that continues the turn: it is not for the model to write.
_END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",
    "<|end_of_text|>",
    "<|endoftext|>",
)

_ID_LIMIT = 2**32
"""The library takes no larger ids."""
_SHORT_CHARACTERS = 2048
"""Texts up to this length encode in a few milliseconds; releasing the GIL would cost more than it saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling parameters recommended by a model's authors; None: no recommendation."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """A checkpoint's tokenizer, independent of its file format."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Text by the name used in chat templates, such as bos_token."""
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    defaults: GenerationDefaults = GenerationDefaults()


class Tokenizer:
    """Immutable after construction; thread-safe."""

    def __init__(self, parts: TokenizerParts, template_arguments: Mapping[str, Any] = NO_ARGUMENTS) -> None:
        """template_arguments: see `ChatTemplate`. Raises CheckpointError for an unsupported decoder or chat
        template, ConfigError for invalid arguments."""
        self._backend = parts.backend
        self._token_bytes = token_bytes(parts.backend)
        added = parts.backend.get_added_tokens_decoder()
        self._added = {token_id: self._written(token) for token_id, token in added.items()}
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._cache: dict[int, bytes] = {}
        self._template = (
            ChatTemplate(parts.chat_template, parts.special_tokens, arguments=template_arguments)
            if parts.chat_template
            else None
        )
        self._defaults = parts.defaults
        self._stop_token_ids = _stop_ids(parts)

    @property
    def vocab_size(self) -> int:
        """Number of ids this tokenizer can decode; a model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text or a turn."""
        return self._stop_token_ids

    @property
    def defaults(self) -> GenerationDefaults:
        return self._defaults

    @property
    def document(self) -> str:
        """The JSON form of `tokenizers`."""
        return str(self._backend.to_str())

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def chat_template(self) -> str | None:
        """The template's Jinja source."""
        return self._template.source if self._template else None

    @property
    def thought_marks(self) -> ThoughtMarks | None:
        """How the model marks thoughts; None: its template knows of none."""
        return thought_marks(self.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Special tokens spelled out in the text become their ids.

        add_special_tokens: adds those that the model expects, such as a leading BOS token.
        """
        if len(text) <= _SHORT_CHARACTERS:
            return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        # Only batch encoding releases the GIL, so that other threads go on meanwhile.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    def fewest_tokens(self) -> FewestTokens | None:
        """None: texts may shrink without bound. Scans the whole vocabulary; call it once."""
        return fewest_tokens(self._backend)

    def tool_style(self, asked: ToolFormat | None = None) -> ToolStyle:
        """See `tool_style.tool_style`. Renders the template a few times: ask once."""
        return tool_style(self._template, asked)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> str:
        """Raises InvalidRequestError if there is no template or it refuses the conversation."""
        if self._template is None:
            raise InvalidRequestError(
                "messages cannot be used: this model has no chat template; use plain completions",
                field="messages",
            )
        return self._template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, arguments=arguments
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The prompt that the assistant's next message continues."""
        # The template itself writes the BOS token if the model needs one.
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The full text of a sequence, without special tokens."""
        detokenizer = self.detokenizer(at_start=True)
        return detokenizer.push(token_ids) + detokenizer.flush()

    def detokenizer(self, *, at_start: bool = False, shown: Collection[int] = ()) -> IncrementalDetokenizer:
        """A detokenizer for one stream of ids. `at_start`: they begin a text rather than continue a prompt.
        shown: added tokens to write out, including special ones."""
        strip = at_start and self._token_bytes.strip_leading_space
        if not shown:
            return IncrementalDetokenizer(self._shown_bytes, strip_leading_space=strip)

        def to_bytes(token_id: int) -> bytes:
            return self._added[token_id] if token_id in shown else self._shown_bytes(token_id)

        return IncrementalDetokenizer(to_bytes, strip_leading_space=strip)

    @property
    def shown_added_token_ids(self) -> tuple[int, ...]:
        """Added tokens that readers see as text, such as thought delimiters, in ascending order."""
        return tuple(sorted(self._added.keys() - self._special))

    def added_token_id(self, text: str) -> int | None:
        """The id of the added token with exactly this text; None: there is none."""
        token_id = self._backend.token_to_id(text)
        return token_id if token_id in self._added else None

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of a single token, with special ones spelled out; empty for an unknown id."""
        return self._added[token_id] if token_id in self._added else self._shown_bytes(token_id)

    def _written(self, token: tokenizers.AddedToken) -> bytes:
        return token.content.encode() if token.special else self._token_bytes.of_added(token.content)

    def _shown_bytes(self, token_id: int) -> bytes:
        shown = self._cache.get(token_id)
        if shown is None:
            shown = self._cache[token_id] = self._compute_bytes(token_id)
        return shown

    def _compute_bytes(self, token_id: int) -> bytes:
        if token_id in self._special:
            return b""
        if token_id in self._added:
            return self._added[token_id]
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._token_bytes(token)


def _stop_ids(parts: TokenizerParts) -> tuple[int, ...]:
    template = parts.chat_template or ""
    ends = (parts.backend.token_to_id(token) for token in _END_OF_TURN if token in template)
    found = {*parts.eos_token_ids, *(token_id for token_id in ends if token_id is not None)}
    unknown = sorted(token_id for token_id in found if not _knows(parts.backend, token_id))
    if unknown:
        _log.warning("end tokens %s are ignored: the tokenizer has no such tokens", unknown)
    known = tuple(sorted(found.difference(unknown)))
    if not known:
        _log.warning("no end token is known: answers end only at stop texts or at their greatest length")
    return known


def _knows(backend: tokenizers.Tokenizer, token_id: int) -> bool:
    return 0 <= token_id < _ID_LIMIT and backend.id_to_token(token_id) is not None
