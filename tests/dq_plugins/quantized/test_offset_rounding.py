from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dq_plugins.affine import integer_range
from dq_plugins.plan import WeightQuant
from dq_plugins.progress import finish
from dq_plugins.quantized.learner import Learner
from dq_plugins.quantized.offset_rounding import OffsetRounding, SignDescent, SignSteps
from dq_plugins.quantized.rounding_variables import RoundingMethod
from dq_plugins.quantized.soft_rounding import AdaRound
from dq_plugins.quantized.weight_scale import weight_parameters

SHAPES = {"up": (48, 24), "down": (24, 48)}


def quantizer(weight: torch.Tensor, bits: int = 3) -> WeightQuant:
    scale, zero_point = weight_parameters(weight, bits, symmetric=False, method="minmax")
    return WeightQuant(bits, scale, zero_point)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_without_steps_weights_are_rounded_to_nearest() -> None:
    weight = normal(6, 10)
    quant, variables = quantizer(weight), OffsetRounding(weight, quantizer(weight))
    assert torch.equal(variables.decided(), quant.quantize(weight))
    for values in (variables.soft(), variables.hard(), variables.start()):
        torch.testing.assert_close(values.detach(), quant.fake_quantize(weight), rtol=0, atol=1e-6)


def test_it_starts_from_the_codes_that_are_there_however_far_and_can_go_back_to_nearest() -> None:
    weight = normal(6, 10)
    nearest = quantizer(weight).quantize(weight).int()
    low, high = integer_range(3)
    moved = (nearest + torch.randint(-2, 3, weight.shape, generator=torch.Generator().manual_seed(1))).clamp(low, high)
    quant = replace(quantizer(weight), codes=moved.to(torch.int8))
    variables = OffsetRounding(weight, quant)
    assert torch.equal(variables.decided(), quant.codes)
    torch.testing.assert_close(variables.start(), quant.fake_quantize(weight))
    with torch.no_grad():
        variables.parameter.zero_()
    variables.project()
    assert torch.equal(variables.decided().int(), nearest)


def test_offsets_stay_within_half_a_step_and_codes_among_the_neighbours() -> None:
    weight = normal(6, 10)
    variables = OffsetRounding(weight, quantizer(weight))
    with torch.no_grad():
        variables.parameter.add_(10 * normal(6, 10, seed=1))
    variables.project()
    assert float(variables.parameter.detach().abs().max()) == 0.5
    assert float((variables.rounded() - variables.ratio).abs().max()) <= 1


def test_the_gradient_passes_through_rounding_and_stops_at_the_last_code() -> None:
    weight = torch.tensor([[0.3, 5.0]])
    quant = WeightQuant(3, torch.tensor([0.5]), None)  # up to 1.5
    variables = OffsetRounding(weight, quant)
    variables.soft().sum().backward()
    assert variables.parameter.grad.tolist() == [[0.5, 0.0]]


def test_steps_are_of_one_size_and_shrink_to_nothing() -> None:
    parameter = torch.zeros(3, requires_grad=True)
    parameter.grad = torch.tensor([1e-6, -100.0, 0.0])
    SignDescent([parameter], 0.1).step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.1, 0.1, 0.0]))
    method = SignSteps(10, 0.1, looks=4)
    assert [method.rate(0), method.rate(5)] == pytest.approx([0.1, 0.05])
    assert method.checks == {3, 5, 8, 10}
    assert SignSteps(1).checks == {1}


def planted(method: RoundingMethod, seed: int) -> tuple[float, float]:
    """Loss after and before learning the 4-bit weights of a residual block whose inputs are correlated."""
    generator = torch.Generator().manual_seed(seed)
    weights = {n: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for n, shape in SHAPES.items()}
    mixing = torch.randn(8, 24, generator=generator) / 3
    rows = torch.randn(8, 48, 8, generator=generator) @ mixing + 0.2 * torch.randn(8, 48, 24, generator=generator)

    def block(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(x @ weights["up"].T) @ weights["down"].T

    def error(learning: dict[str, torch.Tensor], call: int) -> torch.Tensor:
        return (block(learning, rows[call]) - block(weights, rows[call])).square().sum(1).mean()

    order = torch.randint(8, (method.iterations,), generator=generator).tolist()
    variables = {n: method.variables(w, quantizer(w, 4)) for n, w in weights.items()}
    learner = Learner(variables, lambda w, i: error(w, order[i]), method, judge=error, probes=8)
    verdict = finish(learner.run()).verdict
    return verdict.learned_loss, verdict.start_loss


@pytest.mark.parametrize("seed", range(3))
def test_sign_steps_beat_nearest_and_the_relaxation_of_as_many_steps(seed: int) -> None:
    learned, nearest = planted(SignSteps(60), seed)
    assert learned < 0.7 * nearest
    assert learned <= planted(AdaRound(60, 1e-2, 1e5, relative=True), seed)[0]


def test_the_same_again() -> None:
    assert planted(SignSteps(20), 0) == planted(SignSteps(20), 0)


def test_codes_that_are_better_than_what_is_learned_stay() -> None:
    weight = normal(4, 4)
    quant = quantizer(weight)

    def loss(weights: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return (weights["w"] - weight).square().sum()  # nearest is best

    learned = finish(Learner({"w": OffsetRounding(weight, quant)}, loss, SignSteps(20, 0.1)).run())
    assert learned.verdict.kept_start
    assert learned.decided == {}


def test_the_best_of_several_looks_is_kept() -> None:
    weight = normal(4, 4)
    judged = iter([1.0, 0.6, 0.2, 0.9])  # before learning, then after 10, 20 and 30 iterations
    seen: list[torch.Tensor] = []

    def judge(weights: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        seen.append(weights["w"])
        return torch.tensor(next(judged))

    variables = {"w": OffsetRounding(weight, quantizer(weight))}
    method = SignSteps(30, 0.1, looks=3)
    target = normal(4, 4, seed=5)
    loss = lambda weights, _: (weights["w"] - target).square().sum()  # noqa: E731
    learned = finish(Learner(variables, loss, method, judge=judge, probes=1).run())
    assert learned.verdict.learned_loss == pytest.approx(0.2)
    torch.testing.assert_close(replace(quantizer(weight), codes=learned.decided["w"]).fake_quantize(weight), seen[2])
    assert not torch.equal(seen[2], seen[3])
