"""Values that pass between modules and services: requests, outputs, statistics.

Standard library only, so that the gateway and the scheduler never load torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain

from dspark_core.errors import InvalidRequestError, require
from dspark_core.output_rules import NO_ADJUSTMENTS, Grammar, LogitAdjustments


class Verification(Enum):
    """How draft tokens are accepted; never mixed within a request."""

    REJECTION = "rejection"
    COUPLED = "coupled"


class DraftOrigin(Enum):
    """Who proposed a draft block."""

    DRAFTER = "drafter"
    LOOKUP = "lookup"
    """The sequence's own text; see `algorithms.suffix_match`."""


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


MAX_SEED = 2**63 - 1
MAX_TOP_LOGPROBS = 20


MAX_SPEED_FLOOR = 1e6


def check_speed_floor(value: float | None, name: str = "min_tokens_per_second") -> None:
    """Raises InvalidRequestError for what cannot be a promise; NaN fails too."""
    if value is not None:
        require(0.0 < value <= MAX_SPEED_FLOOR, name, value, f"> 0 and at most {MAX_SPEED_FLOOR:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the target distribution is shaped before a token is drawn.

    Order: temperature, then top-k, then top-p, then min-p (relative to the most likely token),
    each over what the previous left. `temperature == 0` is greedy and ignores the rest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        require(0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "in [0, 100]")
        require(self.top_k >= 0, "top_k", self.top_k, ">= 0 (0: off)")
        require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "in (0, 1]")
        require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "in [0, 1]")
        if self.seed is not None:
            require(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"in [0, {MAX_SEED}]")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationOptions:
    enabled: bool = True
    lookup: bool = True
    """Whether drafts may also come from the request's own text, where the verifier offers that."""
    verification: Verification | None = None
    """None: coupled when the request carries a seed, rejection otherwise."""
    max_draft_tokens: int | None = None
    """Upper bound on the verify length; None: the drafter's block size."""

    def __post_init__(self) -> None:
        if self.max_draft_tokens is not None:
            require(self.max_draft_tokens >= 0, "speculation.max_draft_tokens", self.max_draft_tokens, ">= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One completion asked of a verifier."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int | None = None
    """Tokens to generate; None: up to the context limit."""
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends after one of these; it is part of the output."""
    speculation: SpeculationOptions = SpeculationOptions()
    min_tokens_per_second: float | None = None
    """Speed floor: tokens per second after the first token; None: none was promised."""
    tier: str = ""
    """Who asked: the scheduler's queues are by tier. Verifiers are not told."""
    adjustments: LogitAdjustments = NO_ADJUSTMENTS
    grammar: Grammar | None = None
    """What the output must be; None: anything."""
    generated_tokens: int = 0
    """How many of the prompt's last tokens are output already, of a verifier that was lost."""
    top_logprobs: int | None = None
    """Chunks tell each token's log-probability, and those of so many likeliest; None: they do not."""

    def __post_init__(self) -> None:
        if self.adjustments == NO_ADJUSTMENTS:
            object.__setattr__(self, "adjustments", NO_ADJUSTMENTS)  # so that rounds may ask by identity
        check_speed_floor(self.min_tokens_per_second)
        require(
            0 <= self.generated_tokens < max(len(self.prompt_token_ids), 1),
            "generated_tokens",
            self.generated_tokens,
            f"in [0, {len(self.prompt_token_ids)}), the prompt's length",
        )
        if self.top_logprobs is not None:
            require(
                0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
                "top_logprobs",
                self.top_logprobs,
                f"in [0, {MAX_TOP_LOGPROBS}]",
            )
        require(bool(self.request_id), "request_id", self.request_id, "non-empty")
        require(bool(self.prompt_token_ids), "prompt_token_ids", "[]", "non-empty")
        if self.max_tokens is not None:
            require(self.max_tokens >= 1, "max_tokens", self.max_tokens, ">= 1")
        if self.sampling.seed is not None and self.speculation.verification is Verification.REJECTION:
            raise InvalidRequestError(
                "speculation.verification 'rejection' cannot be combined with seed "
                f"{self.sampling.seed}: a seed makes output a function of the request alone, "
                "which only coupled verification keeps",
                field="speculation.verification",
            )

    @property
    def verification(self) -> Verification:
        """The rule this request is verified by."""
        if self.sampling.seed is not None:
            return Verification.COUPLED
        return self.speculation.verification or Verification.REJECTION


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationStats:
    """What speculation did for one request (see `common.proto` for the exact meaning)."""

    rounds: int = 0
    drafted_tokens: int = 0
    verified_tokens: int = 0
    accepted_tokens: int = 0
    committed_tokens: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    lookup_accepted_tokens: int = 0
    """Of the accepted tokens, those looked up in the request's own text."""

    @property
    def accepted_length(self) -> float:
        """Mean tokens committed per round, the bonus token included (the paper's tau)."""
        return self.committed_tokens / self.rounds if self.rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of verified draft tokens that were accepted."""
        return self.accepted_tokens / self.verified_tokens if self.verified_tokens else 0.0

    def plus(self, other: SpeculationStats) -> SpeculationStats:
        """Both together."""
        return SpeculationStats(
            rounds=self.rounds + other.rounds,
            drafted_tokens=self.drafted_tokens + other.drafted_tokens,
            verified_tokens=self.verified_tokens + other.verified_tokens,
            accepted_tokens=self.accepted_tokens + other.accepted_tokens,
            committed_tokens=self.committed_tokens + other.committed_tokens,
            draft_seconds=self.draft_seconds + other.draft_seconds,
            verify_seconds=self.verify_seconds + other.verify_seconds,
            lookup_accepted_tokens=self.lookup_accepted_tokens + other.lookup_accepted_tokens,
        )

    def add_round(
        self,
        *,
        drafted: int,
        verified: int,
        accepted: int,
        committed: int,
        draft_seconds: float,
        verify_seconds: float,
        origin: DraftOrigin = DraftOrigin.DRAFTER,
    ) -> SpeculationStats:
        looked_up = accepted if origin is DraftOrigin.LOOKUP else 0
        return SpeculationStats(  # of every request in every round: `replace` takes twice as long
            rounds=self.rounds + 1,
            drafted_tokens=self.drafted_tokens + drafted,
            verified_tokens=self.verified_tokens + verified,
            accepted_tokens=self.accepted_tokens + accepted,
            committed_tokens=self.committed_tokens + committed,
            draft_seconds=self.draft_seconds + draft_seconds,
            verify_seconds=self.verify_seconds + verify_seconds,
            lookup_accepted_tokens=self.lookup_accepted_tokens + looked_up,
        )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one token of the output, as the target has it: temperature 1, nothing adjusted or truncated."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the likeliest, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateChunk:
    """Tokens committed by one round, or by several whose chunks were joined, with the statistics so far; the
    last one has `finish_reason`."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stats: SpeculationStats | None = None
    cached_prompt_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of each token, where the request asks for them."""

    @classmethod
    def joined(cls, chunks: Sequence[GenerateChunk]) -> GenerateChunk:
        """Consecutive chunks of one request as one."""
        last = chunks[-1]
        if len(chunks) == 1:
            return last
        return cls(
            token_ids=tuple(chain.from_iterable(chunk.token_ids for chunk in chunks)),
            finish_reason=last.finish_reason,
            stats=last.stats,
            cached_prompt_tokens=last.cached_prompt_tokens,
            logprobs=tuple(chain.from_iterable(chunk.logprobs for chunk in chunks)),
        )


class Role(Enum):
    DRAFTER = "drafter"
    VERIFIER = "verifier"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A drafter or verifier as the scheduler sees it."""

    replica_id: str
    role: Role
    address: str
    model: str
    draining: bool = False
    running_requests: int = 0
    waiting_requests: int = 0
    free_kv_fraction: float = 1.0

    def __post_init__(self) -> None:
        for name in ("replica_id", "address", "model"):
            require(bool(getattr(self, name)), name, "''", "non-empty")
        require(self.running_requests >= 0, "running_requests", self.running_requests, ">= 0")
        require(self.waiting_requests >= 0, "waiting_requests", self.waiting_requests, ">= 0")
        require(0.0 <= self.free_kv_fraction <= 1.0, "free_kv_fraction", self.free_kv_fraction, "in [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignRequest:
    """Asks the scheduler for the verifier that should serve a request."""

    request_id: str
    model: str
    prompt_tokens: int = 0
    exclude_replica_ids: tuple[str, ...] = ()
    """Replicas that just failed this request."""
    prefix_hashes: tuple[int, ...] = ()
    """Of the prompt's first 1, 2, ... blocks; see `services.common.prefixes`."""
    min_tokens_per_second: float = 0.0
    """Its speed floor; 0: none."""
    tier: str = ""
    """Whose queue it waits in."""
    wait_seconds: float = 0.0
    """How long it may wait until floors allow it; 0: not at all."""

    def __post_init__(self) -> None:
        for name in ("request_id", "model"):
            require(bool(getattr(self, name)), name, "''", "non-empty")
        check_speed_floor(self.min_tokens_per_second or None)
        require(0.0 <= self.wait_seconds <= 3600.0, "wait_seconds", self.wait_seconds, "in [0, 3600]")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierLoad:
    """How busy a verifier is, fresher than its registration."""

    running_requests: int = 0
    waiting_requests: int = 0
    free_kv_fraction: float = 1.0
    max_running_requests: int = 0
    """0: not told."""
    draining: bool = False
    new_request_ids: tuple[str, ...] = ()
    """Arrived since the last load was sent."""
    speed_floors: tuple[float, ...] = ()
    """Of its requests, each once: which of them are within reach is not the verifier's to say."""

    def __post_init__(self) -> None:
        require(0.0 <= self.free_kv_fraction <= 1.0, "free_kv_fraction", self.free_kv_fraction, "in [0, 1]")
        for floor in self.speed_floors:
            check_speed_floor(floor, "speed_floors")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaKind:
    """What step times are of; replicas of one kind share them."""

    model: str
    engine: str
    hardware: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.model} ({self.dtype}, {self.engine}) on {self.hardware}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """One point of a step-time profile."""

    requests: int
    batch_tokens: int
    context_tokens: int
    """Of all requests together."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierDescription:
    """What a verifier serves; what a gateway needs to know before it tokenizes."""

    model: str
    vocab_size: int
    max_context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSurvival:
    """One request in a round report."""

    sequence_id: str
    survival: tuple[float, ...]
    verify_length: int
    accepted: int
    min_tokens_per_second: float = 0.0
    """Its speed floor; 0: none."""
    origin: DraftOrigin = DraftOrigin.DRAFTER

    @property
    def drafted(self) -> bool:
        """Whether the drafter worked for it: only then do time and confidences say something of it."""
        return bool(self.survival) and self.origin is DraftOrigin.DRAFTER


MAX_COHORTS = 2
"""Of a verifier's requests, that take turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """What one round looked like at a verifier; the scheduler plans from these."""

    replica_id: str
    round: int
    """0: none, the report tells its load only."""
    requests: tuple[RequestSurvival, ...] = field(default=())
    batch_tokens: int = 0
    step_seconds: float = 0.0
    draft_seconds: float = 0.0
    """From asking for drafts until they were there."""
    context_tokens: int = 0
    """Of all requests in the pass."""
    loop_seconds: float = 0.0
    """Between the pass before and this one, drafting left out: committing, delivering, admitting. 0 after
    a rest."""
    profile: tuple[StepTime, ...] = ()
    """Measured at start; only in the first report of a stream."""
    load: VerifierLoad | None = None
    kind: ReplicaKind | None = None
    """Only in the first report of a stream."""
    draft_compute_seconds: float = 0.0
    """Of `draft_seconds`, the drafter's own pass; 0: it did not tell."""
    drafter_id: str = ""
    """Whose drafts these were; empty: not told, or none came."""
    drafter_primed: bool = False
    """The drafter took in context it had missed: `draft_seconds` are not those of a steady pass."""
    hidden_draft_seconds: float = 0.0
    """Of `draft_seconds`, what passed while the target computed others; the round waited for the rest."""
    cohorts: int = 1
    """2: `requests` are about half of those that decode; the others have the next round."""

    @property
    def draft_wait_seconds(self) -> float:
        return self.draft_seconds - self.hidden_draft_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyPlan:
    """How many draft tokens a verifier may verify per round, all requests together."""

    based_on_round: int
    draft_token_capacity: int
    term: int = 0
    """Of the leading scheduler that made it; only grows."""
    curve: tuple[StepTime, ...] = ()
    """Once, for a verifier that sent no profile: the step times of its kind."""
    temperatures: tuple[float, ...] = ()
    """Online calibration by draft position, with `biases`; empty: none."""
    biases: tuple[float, ...] = ()
    draft_price: float = 0.0
    """Tokens that a second of the shared drafter's time is worth to others."""
