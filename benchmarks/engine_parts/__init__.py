"""What `benchmarks.engine` is made of: the machine's floors, step times, a round taken apart."""
