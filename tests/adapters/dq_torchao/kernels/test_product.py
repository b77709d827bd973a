from __future__ import annotations

import pytest
import torch
from dq_torchao.kernels import activation_codes, native, onednn
from dq_torchao.kernels.gelu import FEWEST, gelu
from dq_torchao.kernels.panels import panels, plain
from dq_torchao.kernels.product import LINEAR, product
from torch.nn import functional as F

needs_kernel = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not() or "-")


def operands(outputs: int, *inputs: int) -> tuple[torch.Tensor, ...]:
    weight = torch.randint(-128, 128, (outputs, *inputs), dtype=torch.int8)
    return weight, torch.rand(outputs) + 0.5, torch.randn(outputs)


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 4), (16, 7), (50, 36), (64, 8), (81, 4, 3, 2), (130, 8, 3, 3), (3, 12, 1)]
)
def test_panels_hold_the_codes(shape):
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    laid_out = panels(codes)
    assert torch.equal(plain(laid_out, shape), codes)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("outputs", [1, 16, 33, 64, 100, 192])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 3), (2, 64), (7, 36), (97, 20), (250, 130)])
def test_a_linear_layer_is_that_of_float64(rows, inputs, outputs, threads):
    torch.manual_seed(0)
    weight, weight_scale, bias = operands(outputs, inputs)
    codes = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
    scale, zero = torch.tensor([0.03]), torch.tensor([131], dtype=torch.int32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for b in (bias, None):
            sums = weight.sum(1, dtype=torch.int32)
            y = product(codes, scale, zero, panels(weight), sums, weight_scale, b, *LINEAR)
            exact = (codes.double() - 131) @ weight.double().T * scale.double() * weight_scale.double()
            exact = exact if b is None else exact + b
            torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))
    finally:
        torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("run", [1, 3, 25])
@pytest.mark.parametrize("outputs", [1, 33, 192])
@pytest.mark.parametrize(("rows", "inputs"), [(75, 20), (150, 64)])
def test_runs_of_rows_have_scales_of_their_own(rows, inputs, outputs, run):
    torch.manual_seed(0)
    weight, weight_scale, bias = operands(outputs, inputs)
    codes = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
    scale, zero = torch.rand(rows // run) + 0.01, torch.randint(0, 256, (rows // run,), dtype=torch.int32)
    rest = panels(weight), weight.sum(1, dtype=torch.int32), weight_scale, bias, *LINEAR
    y = product(codes, scale, zero, *rest)
    alone = [product(c, s, z, *rest) for c, s, z in zip(codes.split(run), scale.split(1), zero.split(1), strict=True)]
    assert torch.equal(y, torch.cat(alone))  # one range by one range
    with pytest.raises(ValueError, match=f"{rows} rows, 7 scales"):
        product(codes, torch.ones(7), zero[:7], *rest)


@needs_kernel
@pytest.mark.parametrize("padding", [(0, 0), (1, 1)])
def test_samples_of_a_convolution_have_scales_and_borders_of_their_own(padding):
    torch.manual_seed(0)
    weight, weight_scale, bias = operands(40, 8, 3, 3)
    codes = torch.randint(0, 256, (3, 8, 6, 5), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    scale, zero = torch.rand(3) + 0.01, torch.tensor([0, 131, 255], dtype=torch.int32)
    rest = panels(weight), weight.flatten(1).sum(1, dtype=torch.int32), weight_scale, bias
    window = (3, 3), (1, 1), padding, (1, 1)
    y = product(codes, scale, zero, *rest, *window)
    samples = zip(codes.split(1), scale.split(1), zero.split(1), strict=True)
    assert torch.equal(y, torch.cat([product(*sample, *rest, *window) for sample in samples]))


@needs_kernel
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((3, 2), (2, 1), (1, 0), (1, 2)),
        ((1, 5), (1, 3), (2, 4), (2, 1)),
    ],
)
@pytest.mark.parametrize("size", [(3, 4, 9, 10), (1, 12, 5, 23), (2, 8, 20, 11)])
def test_a_convolution_is_that_of_float64(size, kernel, stride, padding, dilation, layout):
    torch.manual_seed(0)
    weight, weight_scale, bias = operands(70, size[1], *kernel)
    codes = torch.randint(0, 256, size, dtype=torch.uint8).to(memory_format=layout)
    scale, zero = torch.tensor([0.03]), torch.tensor([97], dtype=torch.int32)
    sums = weight.flatten(1).sum(1, dtype=torch.int32)
    y = product(codes, scale, zero, panels(weight), sums, weight_scale, bias, kernel, stride, padding, dilation)
    factor = scale.double() * weight_scale.double().reshape(-1, 1, 1)
    exact = F.conv2d(codes.double() - 97, weight.double(), None, stride, padding, dilation) * factor
    exact += bias.reshape(-1, 1, 1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


@needs_kernel
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("activation", ["", "tanh", "none"])
@pytest.mark.parametrize("size", [(1, 4), (300, 20), (3, 4, 9, 11)])
def test_what_follows_is_what_kernels_of_its_own_make(size, activation, per_channel):
    torch.manual_seed(0)
    kernel = (3, 3) if len(size) == 4 else ()
    weight, weight_scale, bias = operands(100, size[1], *kernel)
    codes = torch.randint(0, 256, size, dtype=torch.uint8)
    scale, zero = torch.tensor([2e-4]), torch.tensor([131], dtype=torch.int32)
    window = (kernel, (1, 1), (1, 1), (1, 1)) if kernel else LINEAR
    sums = weight.flatten(1).sum(1, dtype=torch.int32)
    arguments = (codes, scale, zero, panels(weight), sums, weight_scale, bias, *window)
    y = product(*arguments)
    if activation:
        many = torch.cat([y.permute(0, 2, 3, 1).flatten() if kernel else y.flatten(), torch.zeros(FEWEST)])
        y = gelu(many, activation).as_strided(y.shape, y.stride())
    assert torch.equal(product(*arguments, activation), y)
    factor = torch.rand(100) * 20 if per_channel else torch.tensor([20.0])
    factor, next_zero = factor.reshape(-1, 1, 1) if kernel else factor, torch.tensor([90], dtype=torch.int32)
    expected = activation_codes(y, factor, next_zero, 7)
    assert 64 <= int(expected.min()) < int(expected.max()) <= 191
    found = product(*arguments, activation, factor, next_zero, 7)
    assert found.stride() == y.stride()
    assert torch.equal(found, expected)


@needs_kernel
def test_gated_outputs_that_do_not_fill_panels_are_refused():
    weight, weight_scale, bias = operands(96, 8)
    codes, zero = torch.zeros((2, 8), dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    arguments = (codes, torch.ones(1), zero, panels(weight), weight.sum(1, dtype=torch.int32), weight_scale, bias)
    with pytest.raises(ValueError, match="96 gated outputs are no multiple of 128"):
        product(*arguments, *LINEAR, "gated tanh")


@needs_kernel
def test_the_largest_sums_that_int32_holds():
    inputs = (2**31 - 1) // (255 * 128)  # as lowering allows
    weight = torch.full((16, inputs), -128, dtype=torch.int8)
    codes = torch.full((2, inputs), 255, dtype=torch.uint8)
    one, zero = torch.ones(1), torch.tensor([0], dtype=torch.int32)
    y = product(codes, one, zero, panels(weight), weight.sum(1, dtype=torch.int32), torch.ones(16), None, *LINEAR)
    assert torch.equal(y, torch.full((2, 16), float(-128 * 255 * inputs)))


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(shape):
    weight, weight_scale, bias = operands(5, 8)
    codes, zero = torch.empty(shape, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    y = product(
        codes, torch.ones(1), zero, panels(weight), weight.sum(1, dtype=torch.int32), weight_scale, bias, *LINEAR
    )
    assert y.shape == (*shape[:-1], 5)


@needs_kernel
def test_without_the_kernel_onednn_computes_the_same(monkeypatch):
    torch.manual_seed(0)
    x, w = torch.randint(0, 256, (40, 48), dtype=torch.uint8), torch.randint(-128, 128, (20, 48), dtype=torch.int8)
    arguments = (x, torch.tensor([0.1]), torch.tensor([120], dtype=torch.int32), w.view(torch.uint8).flatten() ^ 128)
    rest = ([20, 48], 8, False, None, None, torch.rand(20), torch.randn(20), torch.float32)
    y = torch.ops.dq_torchao.int8_linear(*arguments, *rest)
    monkeypatch.setattr(onednn, "takes", lambda *_: False)
    torch.testing.assert_close(torch.ops.dq_torchao.int8_linear(*arguments, *rest), y, rtol=1e-5, atol=1e-2)
