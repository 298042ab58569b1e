"""Hugging Face directories to GGUF, one file a family.

Reading order: source (what lies in the directory) → a family (what it is called in GGUF, and in which form) → tensors
(all of them, by those names) → vocabulary (the tokenizer) → baking (steerings folded in) → write (one GGUF, whole or
not at all) → quantize (llama.cpp's own).
"""
