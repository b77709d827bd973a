import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq_plugins.affine import affine_parameters, dequantize, fake_quantize, integer_range, per_row, quantize
from dq_plugins.errors import DQError

BITS = st.integers(2, 8)


@given(BITS, st.booleans(), st.floats(-100, 0), st.floats(0, 100))
def test_zero_is_exact_and_in_range_error_is_half_a_step(bits: int, symmetric: bool, low: float, high: float) -> None:
    scale, zero_point = affine_parameters(torch.tensor(low), torch.tensor(high), bits, symmetric=symmetric)
    q_min, q_max = integer_range(bits)
    assert fake_quantize(torch.tensor(0.0), scale, zero_point, q_min, q_max) == 0
    x = torch.linspace(low, high, 101)
    error = (fake_quantize(x, scale, zero_point, q_min, q_max) - x).abs().max()
    # asymmetric: rounding the zero point to an integer may shift the range by half a step at its ends
    assert error <= scale * (0.5 if symmetric else 1.0) * (1 + 1e-4) + 1e-6


@given(BITS, st.lists(st.integers(-8, 7), min_size=1, max_size=8))
def test_codes_survive_a_round_trip(bits: int, values: list[int]) -> None:
    q_min, q_max = integer_range(bits)
    codes = torch.tensor(values, dtype=torch.float32).clamp(q_min, q_max)
    scale, zero_point = torch.tensor(0.37), torch.tensor(1, dtype=torch.int32)
    assert torch.equal(quantize(dequantize(codes, scale, zero_point), scale, zero_point, q_min, q_max), codes)


def test_matches_the_definition_of_torch() -> None:
    x = torch.randn(1000)
    scale, zero_point = affine_parameters(x.min(), x.max(), 8, symmetric=False)
    ours = quantize(x, scale, zero_point, -128, 127)
    torchs = torch.quantize_per_tensor(x, float(scale), int(zero_point), torch.qint8).int_repr()
    assert torch.equal(ours.to(torch.int8), torchs)


def test_empty_range_gets_scale_one() -> None:
    for symmetric in (True, False):
        scale, zero_point = affine_parameters(torch.zeros(2), torch.zeros(2), 8, symmetric=symmetric)
        assert scale.tolist() == [1, 1]
        assert fake_quantize(torch.zeros(2), scale, zero_point, -128, 127).tolist() == [0, 0]


@pytest.mark.parametrize("bits", [0, 17, 4.0, "8"])
def test_width_is_checked(bits: object) -> None:
    with pytest.raises(DQError, match="1 to 16 bits"):
        integer_range(bits)


def test_parameters_of_rows_broadcast_over_what_is_left():
    rows = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(rows * per_row(torch.tensor([1.0, 10.0]), rows), torch.stack([rows[0], 10 * rows[1]]))
    assert torch.equal(rows * per_row(torch.tensor([2.0]), rows), 2 * rows)
