"""The state of one request inside the round loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from dspark_core.engine.caches.block_manager import ROOT_CONTENT_ID, BlockManager, ContentId
from dspark_core.engine.grammars import SequenceGrammar
from dspark_core.output_rules import NO_ADJUSTMENTS
from dspark_core.records import FinishReason, GenerateRequest, SpeculationStats


@dataclass(slots=True, eq=False)  # compared by identity: comparing fields would compare all tokens
class SequenceState:
    """Committed tokens, their pages, and the progress of each consumer.

    `tokens[-1]` is the anchor once everything before it is computed. `computed` counts positions
    whose keys, values and features are in the cache; draft positions beyond it are scratch.
    """

    request: GenerateRequest
    order: int
    """Order of arrival; the latest is preempted first."""
    noise_seed: int
    """Key of the noise for coupled verification: the request's seed, or one drawn for it."""
    max_length: int
    """Number of prompt and generated tokens at which the request ends."""
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    reached: int = 0
    """What `computed` was when it last gave up its pages: what it finds again, it has not saved computing."""
    cached_prompt_tokens: int = 0
    published_pages: int = 0
    content_id: ContentId = ROOT_CONTENT_ID
    drafter_end: int = 0
    """The drafter holds the features before this position, while its generation is `drafter_generation`."""
    drafter_generation: int = -1
    useful_draft: int | None = None
    """Number of draft tokens likely to be verified, judging by earlier rounds; None: unknown yet."""
    grammar: SequenceGrammar | None = None
    """The grammar of its output, advanced to the last committed token; None: unconstrained."""
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    finish_reason: FinishReason | None = None
    suspect: bool = False
    """It took part in a round that failed, and in none that succeeded since."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)
        self.content_id = self.root

    @property
    def sequence_id(self) -> str:
        return self.request.request_id

    @property
    def root(self) -> ContentId:
        """Parent of its first page: only requests of one salt share pages."""
        return self.request.cache_salt or ROOT_CONTENT_ID

    @property
    def shaped(self) -> bool:
        """Whether its logits are adjusted, masked or reported."""
        request = self.request
        return (
            request.adjustments is not NO_ADJUSTMENTS
            or request.top_logprobs is not None
            or self.grammar is not None
        )

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """Only the anchor is left to compute."""
        return self.uncomputed == 1

    @property
    def remaining(self) -> int:
        """Tokens that may still be committed."""
        return self.max_length - len(self.tokens)

    def learn_useful_draft(self, block_size: int, verified: int) -> None:
        """Learns from a round that verified `verified` draft tokens. Shrinks slowly, and grows while all are
        verified."""
        wish = min(self.useful_draft or block_size, block_size)
        self.useful_draft = verified + 2 if verified >= wish else max(verified + 1, wish - 1)

    def take_pages(self, manager: BlockManager) -> bool:
        """Takes pages for every committed token and one more; returns False, without any change, if there are
        too few.

        Pages that others have filled or are going to fill with the same tokens are shared.
        """
        self.pages = manager.match_prefix(self.tokens, self.root)
        matched = len(self.pages)
        if not self.reserve(manager, len(self.tokens) + 1):
            self.release(manager)
            return False
        manager.announce(self.pages, matched, self.tokens, self.root)
        self.skip_filled(manager)
        return True

    def skip_filled(self, manager: BlockManager) -> None:
        """Skips computing what others have computed on shared pages.

        At least one token is left to compute, since the page of the last one is not shared.
        """
        while manager.is_filled(page := self.next_page):
            self.content_id = manager.content_id_of(page)
            self.published_pages += 1
            known = max(self.computed, self.reached)
            self.computed = self.published_pages * manager.page_tokens
            self.cached_prompt_tokens += max(self.computed - known, 0)

    @property
    def next_page(self) -> int:
        """The page on which its first uncomputed token lies, if that is not the anchor."""
        return self.pages[self.published_pages]

    def reserve(self, manager: BlockManager, length: int) -> bool:
        """Makes sure pages cover positions [0, length); returns False, without any change, if they cannot."""
        missing = manager.pages_for(length) - len(self.pages)
        if missing <= 0:
            return True
        fresh = manager.allocate(missing)
        if fresh is None:
            return False
        self.pages.extend(fresh)
        return True

    def publish_full_pages(self, manager: BlockManager) -> None:
        """Shares pages whose every position is committed and computed."""
        size = manager.page_tokens
        while (self.published_pages + 1) * size <= self.computed:
            start = self.published_pages * size
            tokens = tuple(self.tokens[start : start + size])
            page = self.pages[self.published_pages]
            self.content_id = manager.publish(page, self.content_id, tokens)
            self.published_pages += 1

    def release(self, manager: BlockManager) -> None:
        """Releases every page; committed tokens must then be recomputed or found in the prefix cache."""
        manager.release(self.pages)
        self.pages = []
        self.reached = max(self.reached, self.computed)
        self.computed = 0
        self.published_pages = 0
        self.content_id = self.root
        self.drafter_generation = -1
