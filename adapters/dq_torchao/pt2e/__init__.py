"""Timestep groups in torchao's PT2E flow: ``prepare_pt2e``, sample, ``convert_pt2e``, ``torch.compile``."""

from dq_torchao.pt2e.quantizer import TimestepX86Quantizer

__all__ = ["TimestepX86Quantizer"]
