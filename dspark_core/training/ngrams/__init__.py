"""Tables of n-grams from the target's answers, for drafts that need no draft model."""
