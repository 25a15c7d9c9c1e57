"""Which replicas there are, how busy they are, and who serves a request."""
