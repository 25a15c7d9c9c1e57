"""Parts of `benchmarks.frontier`: the measured stack, the claims and the figures."""
