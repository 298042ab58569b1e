"""Hugging Face directories to GGUF, one file a family.

Reading order: checkpoint (what lies in the directory) → a family (what it is called in GGUF, and in which form) →
vocabulary (the tokenizer) → convert (one GGUF, whole or not at all) → quantize (llama.cpp's own).
"""
