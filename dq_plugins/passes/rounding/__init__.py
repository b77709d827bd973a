"""Rounding of weights, learned against the outputs of blocks."""
