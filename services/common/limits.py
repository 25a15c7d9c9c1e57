"""Numbers that servers and clients must agree on."""

MAX_MESSAGE_BYTES = 64 * 2**20
"""A draft request that primes 16k positions of 2048 bfloat16 features just fits."""

CLIENT_KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000
MIN_PING_INTERVAL_MS = 10_000
"""Servers hang up on clients that ping more often; must stay below `CLIENT_KEEPALIVE_MS`."""
