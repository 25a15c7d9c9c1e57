"""The round loop and its thread: batching, pacing, local planning."""
