"""Differentiable search for timestep groups, and the choice of timesteps to calibrate on (ADP-DM, He et al. 2024)."""
