"""N-gram tables built from the target's answers, for drafting without a draft model."""
