"""Parts of `benchmarks.cohorts`."""
