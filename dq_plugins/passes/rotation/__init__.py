"""Rotations of the inputs of layers, which weights absorb."""
