"""`dspark up`, `chat`, `generate` and `doctor`: running DSpark and talking to it."""
