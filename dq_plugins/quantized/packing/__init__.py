"""Integers of 1 to 8 bits, stored without gaps."""

from dq_plugins.quantized.packing.bits import Alphabet, alphabet_range, pack_bits, packed_bytes, unpack_bits
from dq_plugins.quantized.packing.signs import pack_signs, unpack_signs

__all__ = ["Alphabet", "alphabet_range", "pack_bits", "pack_signs", "packed_bytes", "unpack_bits", "unpack_signs"]
