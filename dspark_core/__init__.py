"""DSpark speculative decoding with no network in it: algorithms, models, engines, training."""
