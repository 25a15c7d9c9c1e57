"""Evaluates drafters by real speculative decoding: accepted length, acceptance, confidence, thresholds."""
