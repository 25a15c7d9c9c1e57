"""What outlives a scheduler: replicas and what was learned, in memory or in Redis."""
