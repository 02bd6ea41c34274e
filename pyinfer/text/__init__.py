"""Text in and out: tokens from GGUF metadata, streaming detokenization, chat templates."""
