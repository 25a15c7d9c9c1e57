"""Engines of drafters: contexts of many sequences, and blocks drafted for them."""
