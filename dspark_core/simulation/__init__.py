"""Replays recorded rounds and simulates clusters, with the same planners as the services."""
