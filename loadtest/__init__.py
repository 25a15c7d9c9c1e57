"""Load test of a running gateway: streamed chats, what users saw, and whether a speed promise held."""
