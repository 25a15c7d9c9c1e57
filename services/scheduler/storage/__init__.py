"""What outlives a scheduler: documents, in memory or in Redis."""
