"""Text to token ids and back: tokenizers of checkpoints, chat templates, streaming detokenisation."""
