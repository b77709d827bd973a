"""Tokens of a text embedding that are the same for every prompt and far larger than the rest (MixDQ)."""
