"""The model as a server: OpenAI's interface with a dial, of our own engine or in front of llama-server."""
