"""The users' door: OpenAI REST and gRPC."""
