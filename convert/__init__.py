"""Making GGUF files that pyinfer runs, from other files of the same model."""
