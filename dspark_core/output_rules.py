"""Constraints a request puts on its output, apart from sampling: logit adjustments and grammars."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dspark_core.errors import require

MAX_BIASED_TOKENS = 1024
LEAST_PENALTY = 0.01
"""Minimum `repetition_penalty`: it scales negative logits, and a smaller one could revive a banned token."""


def check_bias_count(count: int) -> None:
    """Also for those who have pairs yet to make: before that."""
    require(count <= MAX_BIASED_TOKENS, "logit_bias", f"{count} tokens", f"of <= {MAX_BIASED_TOKENS} tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitAdjustments:
    """Adjustments of the target's logits before any token is drawn, greedily or not.

    Applied in the order other engines use: `min_tokens`, `logit_bias`, `repetition_penalty`, then presence
    and frequency penalties. Speculation is lossless with respect to the adjusted target.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, value added to its logit), each token at most once."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in the prompt or output are divided by it, negative ones multiplied."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token that occurs in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output."""
    min_tokens: int = 0
    """Stop tokens are banned until the output has this many tokens."""

    def __post_init__(self) -> None:
        count, ids = len(self.logit_bias), {token_id for token_id, _ in self.logit_bias}
        check_bias_count(count)
        require(len(ids) == count, "logit_bias", f"{count - len(ids)} repeated", "of each token once")
        for token_id, bias in self.logit_bias:
            require(token_id >= 0, "logit_bias", f"token id {token_id}", "of token ids >= 0")
            require(-100.0 <= bias <= 100.0, "logit_bias", f"{bias} for token {token_id}", "in [-100, 100]")
        require(
            LEAST_PENALTY <= self.repetition_penalty <= 100.0,
            "repetition_penalty",
            self.repetition_penalty,
            f"in [{LEAST_PENALTY}, 100]",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            require(-2.0 <= getattr(self, name) <= 2.0, name, getattr(self, name), "in [-2, 2]")
        require(self.min_tokens >= 0, "min_tokens", self.min_tokens, ">= 0")


NO_ADJUSTMENTS = LogitAdjustments()


class GrammarKind(Enum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


MAX_GRAMMAR_CHARACTERS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """Constrains the output as a whole. Speculation is lossless with respect to the constrained target, which
    never draws a token that cannot lead to a valid output."""

    kind: GrammarKind
    text: str
    """A JSON schema, a regular expression, or a grammar in Lark's notation."""

    def __post_init__(self) -> None:
        require(bool(self.text.strip()), "grammar", repr(self.text), "a text")
        size = f"{len(self.text)} characters"
        require(
            len(self.text) <= MAX_GRAMMAR_CHARACTERS,
            "grammar",
            size,
            f"<= {MAX_GRAMMAR_CHARACTERS} characters",
        )
