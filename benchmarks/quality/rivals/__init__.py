"""Other codes of a KV cache, as plain reference implementations: one a file."""
