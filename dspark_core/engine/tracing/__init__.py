"""Traces of rounds: format, writer, and the plan source that records."""
