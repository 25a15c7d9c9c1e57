"""Parts of the throttle benchmark: a verifier that can be slowed down, what its rounds verify."""
