"""Replays recorded rounds and simulates clusters, with the planners that serve."""
