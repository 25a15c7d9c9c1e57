"""One training objective per drafting algorithm, behind a common protocol."""
