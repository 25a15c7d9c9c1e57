"""Limits of a cluster's size."""

MOST_VERIFIERS = 1024
"""That a scheduler serves. It has a stream of each, remembers what it learned of as many, to have it after a
reconnect, and prices drafters for as many."""
