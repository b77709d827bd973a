"""Fewer timesteps and their widths, chosen together (TMPQ-DM)."""
