"""Numbers that servers and clients must agree on, and how far settings may go."""

MAX_MESSAGE_BYTES = 64 * 2**20
"""A draft request that primes 16k positions of 2048 bfloat16 features just fits."""

CLIENT_KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000
MIN_PING_INTERVAL_MS = 10_000
"""Servers hang up on clients that ping more often; must stay below `CLIENT_KEEPALIVE_MS`."""

MOST_SECONDS = 7 * 86400.0
"""Of any time that is set. gRPC takes a deadline some thousand years ahead for one that is over."""
LEAST_PERIOD_SECONDS = 0.1
"""Of what is done again and again: less would keep a core busy, or Redis."""
MOST_MESSAGE_BYTES = 2**31 - 1
"""What gRPC's options can hold."""
LEAST_BODY_BYTES = 256
"""No chat is much shorter."""
MOST_THREADS = 1024
"""Of PyTorch's operators, which crash where the system has not as many."""
MOST_RUNNING = 2**16
"""Requests in one batch: arrays have a row for each."""
MOST_BATCH_TOKENS = 2**20
MOST_KV_CACHE_MB = 2**24
"""16 TiB; whether this machine has so much, the engine looks."""
