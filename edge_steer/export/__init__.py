"""One steering for programs that know nothing of it: adapters, baked weights, control vectors, embedded metadata."""
