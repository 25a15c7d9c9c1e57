"""`dspark profile`, `replay` and `simulate`: measuring and sizing clusters."""
