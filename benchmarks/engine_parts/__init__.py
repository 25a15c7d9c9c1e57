"""Parts of `benchmarks.engine`: the machine's floors, step times, and the breakdown of a round."""
