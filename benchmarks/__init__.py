"""Speed comparisons: each prints a table and writes JSON. Not part of the test suite."""
