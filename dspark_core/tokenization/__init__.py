"""Text to token ids and back: checkpoint tokenizers, chat templates, streaming detokenisation."""
