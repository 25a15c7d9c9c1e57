"""Thoughts of thinking models: found in an answer, and let in before a grammar."""
