"""How much quantizing one layer's weight or input at one width disturbs the denoiser, for all layers and widths."""
