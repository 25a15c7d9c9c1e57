"""Measures drafters: accepted length, acceptance by position, calibration."""
