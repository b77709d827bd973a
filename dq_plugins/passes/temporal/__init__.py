"""What a denoiser computes from the timestep alone: reconstructed, ranged and tabulated (TFMQ-DM)."""
