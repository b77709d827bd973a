"""Which layer gets how many bits: sensitivities, and the exact program that spends a budget (MixDQ)."""
