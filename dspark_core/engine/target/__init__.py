"""The target engine: ragged batches, and the passes that compute them."""
