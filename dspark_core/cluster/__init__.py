"""What a scheduler knows of a cluster and decides from it: values and an injected clock, no network."""
