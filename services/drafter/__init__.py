"""Serves draft blocks from context features."""
