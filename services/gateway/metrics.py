"""Prometheus metrics of the gateway, named consistently with the other services."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dspark_core.errors import DeadlineError, UnavailableError
from dspark_core.records import SpeculationStats

CANCELLED = "cancelled"
"""Outcome of a generation whose caller left."""

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
_DURATION = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_ACCEPTED_LENGTH = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)


class TierMetrics:
    """What the callers of each tier were promised, used and were refused."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._promises = Counter(
            "dspark_gateway_speed_floors",
            "Generations with a promised speed floor, by tier and whether it was held",
            ["tier", "held"],
            registry=registry,
        )
        self._tier_tokens = Counter(
            "dspark_gateway_tier_tokens",
            "Tokens by tier and kind: prompt, cached (of those) or completion",
            ["tier", "kind"],
            registry=registry,
        )
        self._quota_refusals = Counter(
            "dspark_gateway_quota_refusals",
            "Requests refused because their key had used up a quota, by tier and quota",
            ["tier", "quota"],
            registry=registry,
        )

    def quota_refused(self, tier: str, quota: str) -> None:
        self._quota_refusals.labels(tier, quota).inc()

    def prompt(self, tier: str, prompt_tokens: int, cached_tokens: int) -> None:
        self._tier_tokens.labels(tier, "prompt").inc(prompt_tokens)
        self._tier_tokens.labels(tier, "cached").inc(cached_tokens)

    def completion(self, tier: str, tokens: int) -> None:
        self._tier_tokens.labels(tier, "completion").inc(tokens)

    def promise(self, tier: str, *, held: bool) -> None:
        for held_label in ("yes", "no"):
            self._promises.labels(tier, held_label)  # both are there, or a share of one could not be told
        self._promises.labels(tier, "yes" if held else "no").inc()


class GatewayMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._http_requests = Counter(
            "dspark_gateway_http_requests",
            "HTTP requests answered, by route and status code (499: the client left before it began)",
            ["route", "code"],
            registry=registry,
        )
        self._generations = Counter(
            "dspark_gateway_generations",
            "Generations ended, by finish reason or error type",
            ["outcome"],
            registry=registry,
        )
        for failure in (UnavailableError, DeadlineError):
            # There from the start: Prometheus takes a series' first value for no rise.
            self._generations.labels(failure.__name__)
        self._tokens = Counter(
            "dspark_gateway_tokens", "Tokens, by kind: prompt or completion", ["kind"], registry=registry
        )
        self._first_token = _histogram(
            registry, "time_to_first_token_seconds", "From arrival to the first token", _FIRST_TOKEN
        )
        self._inter_token = _histogram(
            registry,
            "inter_token_seconds",
            "Time between rounds of a request, divided by the tokens the later one committed",
            _INTER_TOKEN,
        )
        self._duration = _histogram(
            registry,
            "generation_seconds",
            "From arrival to the end, of those that had a first token",
            _DURATION,
        )
        self._accepted_length = _histogram(
            registry,
            "accepted_length",
            "Mean tokens committed per round of a request, bonus token included",
            _ACCEPTED_LENGTH,
        )
        self._speculation = Counter(
            "dspark_gateway_draft_tokens",
            "Draft tokens, by what became of them: drafted, verified or accepted",
            ["stage"],
            registry=registry,
        )
        self.tiers = TierMetrics(registry)

    def watch_queue(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Registers gauges that are read when scraped."""
        for state, read in (("running", running), ("waiting", waiting)):
            gauge = Gauge(f"dspark_gateway_requests_{state}", f"Requests {state} now", registry=self.registry)
            gauge.set_function(read)

    def http_request(self, route: str, code: int) -> None:
        self._http_requests.labels(route, str(code)).inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def prompt(self, tier: str, prompt_tokens: int, cached_tokens: int) -> None:
        """To call at the first token: prompts of refused requests were never computed."""
        self._tokens.labels("prompt").inc(prompt_tokens)
        self.tiers.prompt(tier, prompt_tokens, cached_tokens)

    def next_tokens(self, seconds: float, tokens: int) -> None:
        self._inter_token.observe(seconds / max(tokens, 1))

    def generation_ended(
        self,
        outcome: str,
        *,
        seconds: float,
        completion_tokens: int,
        stats: SpeculationStats | None,
    ) -> None:
        self._generations.labels(outcome).inc()
        if completion_tokens:  # refusals take no time and would distort the durations
            self._duration.observe(seconds)
        self._tokens.labels("completion").inc(completion_tokens)
        if stats is not None and stats.rounds:
            self._accepted_length.observe(stats.accepted_length)
            self._speculation.labels("drafted").inc(stats.drafted_tokens)
            self._speculation.labels("verified").inc(stats.verified_tokens)
            self._speculation.labels("accepted").inc(stats.accepted_tokens)


def _histogram(
    registry: CollectorRegistry, name: str, documentation: str, buckets: tuple[float, ...]
) -> Histogram:
    return Histogram(f"dspark_gateway_{name}", documentation, buckets=buckets, registry=registry)
