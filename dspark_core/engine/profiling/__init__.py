"""Measures step and draft times, and keeps them on disk."""
