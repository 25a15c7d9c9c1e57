"""Engines and the round loop: paged caches, ragged batches, drafting, verification."""
