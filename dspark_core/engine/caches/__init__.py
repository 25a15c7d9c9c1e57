"""Pages and slots of the KV cache: who holds which, and where keys and values lie."""
