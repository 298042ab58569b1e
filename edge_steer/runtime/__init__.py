"""Running models: the native hook, and llama.cpp with it."""
