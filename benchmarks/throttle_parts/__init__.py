"""Parts of the throttle benchmark: a verifier that can be slowed down, and the analysis of its rounds."""
