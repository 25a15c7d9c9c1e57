"""The engines that `benchmarks.peers` compares, one module each."""
