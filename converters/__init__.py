"""Hugging Face directories to GGUF, one file a family."""
