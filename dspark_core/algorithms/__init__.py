"""Policy: pure functions of values. No clock, no network, no environment."""
