"""The one quantized run: a denoiser some of whose layers are quantized, and what it is made of."""
