"""What `benchmarks.peers` measures and compares, one module an engine."""
