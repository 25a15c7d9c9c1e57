"""From target logits to verdicts: adjusting, masking, accepting, drawing, log-probabilities."""
