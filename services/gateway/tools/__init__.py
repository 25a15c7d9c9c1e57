"""Tools: declaring them to the model, constraining calls by grammars, finding calls in an answer."""
