"""Target decoders and drafters as pure torch modules; they know nothing of caches or batching."""
