"""Integer kernels behind two operators, ``dq_torchao::int8_linear`` and ``dq_torchao::int8_conv2d``."""

from dq_torchao.kernels.codes import activation_codes, code_offset, kernel_dtype
from dq_torchao.kernels.devices import kernel_for, plain_codes, prepacked_bytes, release
from dq_torchao.kernels.dynamic_codes import dynamic_codes
from dq_torchao.kernels.graphs import int8_conv2d, int8_linear
from dq_torchao.kernels.operators import Kernel, weight_code_sum
from dq_torchao.kernels.packing import StoredWeight, unpack_codes
from dq_torchao.kernels.tracing import is_merged

__all__ = [
    "Kernel",
    "StoredWeight",
    "activation_codes",
    "code_offset",
    "dynamic_codes",
    "int8_conv2d",
    "int8_linear",
    "is_merged",
    "kernel_dtype",
    "kernel_for",
    "plain_codes",
    "prepacked_bytes",
    "release",
    "unpack_codes",
    "weight_code_sum",
]
