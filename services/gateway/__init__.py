"""The service clients talk to: OpenAI-compatible REST and gRPC."""
