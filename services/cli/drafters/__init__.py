"""`dspark train`, `calibrate` and `eval`: making and judging drafters."""
