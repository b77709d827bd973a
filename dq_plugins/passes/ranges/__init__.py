"""Clip ranges of weights and activations, and the timestep groups they belong to (ADP-DM)."""
