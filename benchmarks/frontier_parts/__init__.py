"""The parts of `benchmarks.frontier`: the measured stack, its claims, its figures."""
