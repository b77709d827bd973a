import pytest
import torch

from dq_plugins.affine import fake_quantize, integer_range
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant, WeightQuant
from dq_plugins.quantized.straight_through import fake_quantize_ste
from dq_plugins.quantized.variables import Correction, InputClip, InputRange, WeightScale

CPU = torch.device("cpu")


def quantizer(zero_points: list[int]) -> ActivationQuant:
    return ActivationQuant(4, "default", torch.tensor([0.5, 2.0]), torch.tensor(zero_points, dtype=torch.int32))


def test_a_range_starts_at_the_quantizer_and_moves_by_shares_of_itself() -> None:
    variables = InputRange(quantizer([-3, 2]), CPU)
    assert torch.equal(variables.start(), torch.tensor([[0.5, 2.0], [-3.0, 2.0]]))
    with torch.no_grad():
        variables.parameter += torch.tensor([[0.0, 0.1], [0.2, 0.0]])
    torch.testing.assert_close(variables.decided(), torch.tensor([[0.5, 2.0 * 1.1051709], [0.0, 2.0]]))
    assert torch.equal(variables.start(), torch.tensor([[0.5, 2.0], [-3.0, 2.0]]))


def test_a_symmetric_range_stays_symmetric_and_a_zero_point_stays_a_code() -> None:
    symmetric, other = InputRange(quantizer([0, 0]), CPU), InputRange(quantizer([-3, 2]), CPU)
    with torch.no_grad():
        for each in (symmetric, other):
            each.parameter += 5.0
    assert torch.equal(symmetric.hard()[1], torch.zeros(2))
    assert torch.equal(other.hard()[1], torch.full((2,), 7.0))


@pytest.mark.parametrize("code", [-3, 0, 4])
def test_clipped_values_move_the_range_as_finite_differences_say(code: int) -> None:
    x, low, high = torch.tensor([-40.0, 40.0]), *integer_range(4)
    z = torch.tensor(float(code), requires_grad=True)
    s = torch.tensor(0.5, requires_grad=True)
    out = fake_quantize_ste(x, s, z, low, high)
    assert torch.equal(out.detach(), fake_quantize(x, s.detach(), z.detach(), low, high))
    out.sum().backward()

    def clipped(scale: float, zero: float) -> float:
        return scale * (low - zero) + scale * (high - zero)

    assert float(s.grad) == pytest.approx((clipped(0.51, code) - clipped(0.5, code)) / 0.01, rel=1e-4)
    assert float(z.grad) == pytest.approx(clipped(0.5, code + 1) - clipped(0.5, code), rel=1e-4)


def test_the_share_of_the_extremes_starts_at_the_quantizers_and_stays_a_share() -> None:
    share = InputClip(DynamicActivationQuant(4, clip=0.8), CPU)
    assert float(share.start()) == pytest.approx(0.8)
    with torch.no_grad():
        share.parameter += 0.1
    share.project()
    assert float(share.decided()) == pytest.approx(0.8 * 1.1051709)
    with torch.no_grad():
        share.parameter += 3.0
    share.project()
    assert float(share.decided()) == pytest.approx(1.0)
    share.soft().backward()
    assert float(share.parameter.grad) == pytest.approx(1.0)


def test_groups_of_other_widths_move_at_the_pace_of_their_own_steps() -> None:
    """An end of a range moves by the same share of a step: at 8 bits a seventeenth as far as at 4."""
    clips = InputClip(DynamicActivationQuant(8, True, 1.0, "all", (4, 8), (0.5, 0.5)), CPU)
    table = InputRange(ActivationQuant(8, "all", torch.ones(3), torch.zeros(3).int(), group_bits=(4, 8, None)), CPU)
    with torch.no_grad():
        clips.parameter += 0.17
        table.parameter += 0.17
    clips.project()
    torch.testing.assert_close(clips.decided() / 0.5, torch.tensor([0.17, 0.01]).exp())
    torch.testing.assert_close(table.decided()[0], torch.tensor([0.17, 0.01, 0.17]).exp())


def test_scales_and_corrections_start_where_they_were_and_move_in_their_units() -> None:
    scale = WeightScale(WeightQuant(4, torch.tensor([0.1, 0.2])), CPU)
    table = Correction(torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 0.1]]))
    assert torch.equal(scale.start(), torch.tensor([0.1, 0.2]))
    assert torch.equal(table.start(), torch.tensor([[1.0, 2.0]]))
    with torch.no_grad():
        scale.parameter += 0.01
        table.parameter += 0.01
    torch.testing.assert_close(scale.decided() / torch.tensor([0.1, 0.2]), torch.full((2,), 1.0100502))
    torch.testing.assert_close(table.decided(), torch.tensor([[1.1, 2.001]]))
