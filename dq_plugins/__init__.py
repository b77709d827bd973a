"""Quantization passes for diffusion models, for torchao, Brevitas and plain PyTorch."""
