"""What GPU engines share: attention, recorded passes, sizes to record, logits."""
