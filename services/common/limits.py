"""Limits that servers and clients must agree on, and bounds of settings."""

MAX_MESSAGE_BYTES = 64 * 2**20
"""A draft request that primes 16k positions of 2048 bfloat16 features just fits."""

CLIENT_KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000
MIN_PING_INTERVAL_MS = 10_000
"""Servers disconnect clients that ping more often; must stay below `CLIENT_KEEPALIVE_MS`."""

MOST_SECONDS = 7 * 86400.0
"""For any duration. gRPC takes a deadline some thousand years ahead for one that has passed."""
LEAST_PERIOD_SECONDS = 0.1
"""For recurring work: a shorter period would keep a core, or Redis, busy."""
MOST_MESSAGE_BYTES = 2**31 - 1
"""The most that gRPC's options can hold."""
LEAST_BODY_BYTES = 256
"""No chat request is much shorter."""
MOST_THREADS = 1024
"""For PyTorch's operators, which crash if the system cannot provide that many."""
MOST_RUNNING = 2**14
"""Requests in one batch: arrays have a row for each, and so has every round report, which takes the scheduler
some 0.1 s to read and to plan for at this size."""
MOST_BATCH_TOKENS = 2**20
DEFAULT_BATCH_TOKENS = 512
"""Where more requests than that may run, as many tokens: each verifies at least its anchor."""
MOST_TIERS = 64
"""Of callers; each has a queue and series of metrics of its own."""
MOST_KV_CACHE_MB = 2**24
"""16 TiB; the engine checks whether this machine has that much."""
LEAST_STEP_SECONDS = 1e-7
"""No device computes a step that fast; a verifier that reported it would attract all requests."""
MOST_ROUND_SECONDS = 3600.0
"""For the parts of a round. Far beyond that, sums of reported times would overflow."""
MOST_BLOCK_TOKENS = 256
"""Draft tokens of one request in one round, far more than drafters and lookups propose."""
