"""What can be trained: one objective per drafting algorithm, behind one protocol."""
