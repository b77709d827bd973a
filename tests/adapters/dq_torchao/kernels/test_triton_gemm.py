"""The GPU kernel in Triton's interpreter, on a CPU: its arithmetic, masks and borders, not its speed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is in the extra 'test'")
if torch.cuda.is_available():
    pytest.skip("the kernels themselves run on this GPU: test_cuda.py", allow_module_level=True)
from dq_torchao.kernels.triton_gemm import CONFIGS, implicit_gemm

SMALL = min(CONFIGS, key=lambda config: config.kwargs["BM"] * config.kwargs["BN"])
WINDOWS = [
    (kernel, stride, padding, dilation)
    for kernel, stride, padding, dilation in itertools.product(
        ((1, 1), (3, 3), (3, 1)), ((1, 1), (2, 2)), ((0, 0), (1, 1), (2, 1)), ((1, 1), (2, 2))
    )
]


def codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def convolved(
    image: Tensor, weight: Tensor, zero: int, scale: float, weight_scale: Tensor, bias: Tensor | None, *window: tuple
) -> Tensor:
    """The definition, in float64: borders are real zeros."""
    y = F.conv2d(image.double() - zero, weight.double(), None, *window)
    y = y * scale * weight_scale.double()[:, None, None]
    return y if bias is None else y + bias.double()[:, None, None]


def by_kernel(
    image: Tensor,
    weight: Tensor,
    zero: int,
    scale: float,
    weight_scale: Tensor,
    bias: Tensor | None,
    *window: tuple,
    config=SMALL,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    stride, padding, dilation = window
    shape = F.conv2d(image.float(), weight.float(), None, *window).shape
    output = torch.full(shape, torch.nan, dtype=dtype).to(memory_format=torch.channels_last)
    matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1).contiguous()
    implicit_gemm(
        image.to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        output.permute(0, 2, 3, 1),
        torch.tensor([scale]),
        torch.tensor([zero], dtype=torch.int32),
        matrix,
        matrix.sum(1, dtype=torch.int32),
        weight_scale,
        bias,
        (weight.shape[2], weight.shape[3]),
        stride,
        padding,
        dilation,
        config,
    )
    return output


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), WINDOWS)
def test_convolutions_are_the_definition(kernel, stride, padding, dilation) -> None:
    image, weight = codes(2, 8, 5, 6), codes(10, 8, *kernel, seed=1)
    scales, bias = torch.rand(10) + 0.1, torch.randn(10) if stride == (1, 1) else None
    case = (image, weight, -37, 0.02, scales, bias, stride, padding, dilation)
    torch.testing.assert_close(by_kernel(*case).double(), convolved(*case), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 10), (7, 5), (1, 1), (130, 70)])
@pytest.mark.parametrize("rows", [1, 37])
def test_linear_layers_are_convolutions_of_one_pixel(rows: int, inputs: int, outputs: int) -> None:
    image, weight = codes(rows, inputs, 1, 1), codes(outputs, inputs, 1, 1, seed=1)
    case = (image, weight, 5, 0.1, torch.rand(outputs), torch.randn(outputs), (1, 1), (0, 0), (1, 1))
    torch.testing.assert_close(by_kernel(*case).double(), convolved(*case), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_size_of_tiles_gives_the_same(config) -> None:
    image, weight = codes(2, 20, 6, 5), codes(12, 20, 3, 3, seed=1)
    case = (image, weight, 9, 0.01, torch.rand(12), torch.randn(12), (1, 1), (1, 1), (1, 1))
    assert torch.equal(by_kernel(*case, config=config), by_kernel(*case))


def test_groups_are_slices_of_channels() -> None:
    image, weight = codes(1, 12, 5, 5), codes(8, 6, 3, 3, seed=1)
    scales, window = torch.rand(8), ((1, 1), (1, 1), (1, 1))
    expected = F.conv2d(image.double() - 3, weight.double(), None, *window, groups=2) * 0.1 * scales[:, None, None]
    for group in range(2):
        rows, channels = slice(4 * group, 4 * group + 4), slice(6 * group, 6 * group + 6)
        y = by_kernel(image[:, channels], weight[rows], 3, 0.1, scales[rows], None, *window)
        torch.testing.assert_close(y.double(), expected[:, rows], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_results_in_half_precision(dtype: torch.dtype) -> None:
    image, weight = codes(1, 8, 4, 4), codes(6, 8, 1, 1, seed=1)
    case = (image, weight, 0, 0.001, torch.rand(6), None, (1, 1), (0, 0), (1, 1))
    torch.testing.assert_close(by_kernel(*case, dtype=dtype).double(), convolved(*case), rtol=2e-3, atol=1e-3)
