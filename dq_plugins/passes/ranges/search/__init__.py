"""Differentiable search for timestep groups, and the choice of timesteps to calibrate on (ADP-DM, Wang et al. 2024)."""
