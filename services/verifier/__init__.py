"""Holds the target model and owns the round loop."""
