import itertools

import pytest
import torch

from dq_plugins.affine import integer_range
from dq_plugins.errors import RecipeError
from dq_plugins.plan import WeightQuant
from dq_plugins.quantized.learner import Learner, Verdict
from dq_plugins.quantized.soft_rounding import AdaRound, SoftRounding
from dq_plugins.quantized.weight_scale import weight_parameters


def quantizer(weight: torch.Tensor, bits: int, symmetric: bool = True) -> WeightQuant:
    scale, zero_point = weight_parameters(weight, bits, symmetric=symmetric, method="minmax")
    return WeightQuant(bits, scale, None if symmetric else zero_point)


def run(generator):
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_relaxed_weight_starts_at_full_precision(bits: int, symmetric: bool) -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(bits))
    quant = quantizer(weight, bits, symmetric)
    q_min, q_max = integer_range(bits)
    zero_point = 0 if symmetric else quant.zero_point[:, None]
    step = quant.scale[:, None]
    inside = (weight >= step * (q_min - zero_point)) & (weight <= step * (q_max - zero_point))
    soft = SoftRounding(weight, quant).soft()
    assert (soft - weight)[inside].abs().max() < 1e-4


def test_without_training_hard_is_nearest() -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    quant = quantizer(weight, 4)
    variables = SoftRounding(weight, quant)
    assert torch.equal(variables.decided(), quant.quantize(weight))
    assert torch.equal(variables.hard(), quant.fake_quantize(weight))
    assert torch.equal(variables.start(), quant.fake_quantize(weight))


def test_codes_and_hard_weight_agree() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    quant = quantizer(weight, 3, symmetric=False)
    variables = SoftRounding(weight, quant)
    with torch.no_grad():
        variables.parameter.neg_()
    learned = WeightQuant(3, quant.scale, quant.zero_point, variables.decided())
    assert torch.equal(learned.fake_quantize(weight), variables.hard())


def test_closes_most_of_the_gap_between_nearest_and_brute_force() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 8, generator=g)
    x = torch.randn(64, 8, generator=g) @ torch.randn(8, 8, generator=g)
    variables = SoftRounding(weight, quantizer(weight, 3))
    target = x @ weight.T

    def channel_errors(hard: torch.Tensor) -> torch.Tensor:
        return (x @ hard.T - target).pow(2).mean(0)

    # the channels are independent, so all 2^8 roundings of one can be tried for every channel at once
    ups = torch.tensor(list(itertools.product([0, 1], repeat=8)), dtype=torch.float32)
    tried = torch.stack([channel_errors(variables.weight(variables.floor + up)) for up in ups])
    best = tried.amin(0).sum().item()

    options = AdaRound(iterations=800, learning_rate=1e-2, weight=0.1)
    result = run(Learner({"w": variables}, lambda w, _: channel_errors(w["w"]).sum(), options).run())
    assert best * (1 - 1e-5) <= result.verdict.learned_loss
    assert result.verdict.learned_loss - best < 0.5 * (result.verdict.start_loss - best)


def test_regulariser_decides_every_variable() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    variables = SoftRounding(weight, quantizer(weight, 4))
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(4))

    def loss(weights, _iteration):
        return (x @ (weights["w"] - weight).T).pow(2).mean()

    run(Learner({"w": variables}, loss, AdaRound(iterations=2000, learning_rate=1e-2)).run())
    up = variables.up()
    assert ((up < 0.01) | (up > 0.99)).float().mean() > 0.99


def test_nearest_is_kept_when_learning_does_not_help() -> None:
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    variables = SoftRounding(weight, quantizer(weight, 4))

    def loss(weights, _iteration):
        return (weights["w"] - weight).pow(2).sum()  # nearest is optimal

    with torch.no_grad():
        variables.parameter.neg_()
    result = run(Learner({"w": variables}, loss, AdaRound(iterations=1)).run())
    assert result.verdict.kept_start
    assert result.decided == {}


def test_a_gain_within_chance_is_none() -> None:
    start = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    lucky = Verdict(start, torch.tensor([0.0, 1.3, 1.2, 1.4], dtype=torch.float64))  # better on one probe of four
    clear = Verdict(start, torch.tensor([0.9, 0.8, 0.9, 1.0], dtype=torch.float64))
    assert lucky.learned_loss < lucky.start_loss
    assert lucky.kept_start
    assert not clear.kept_start
    assert not Verdict(start[:1], start[:1] - 0.1).kept_start  # one probe knows no chance
    assert Verdict(start, start).kept_start
    assert Verdict(start, torch.full_like(start, torch.inf)).kept_start  # nothing was looked at


def test_beta_is_linear_after_the_warm_up() -> None:
    options = AdaRound(iterations=100, warmup=0.2)
    assert options.beta(19) is None
    assert options.beta(20) == 20
    assert options.beta(60) == pytest.approx(11)
    assert options.beta(100) == pytest.approx(2)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    weight = torch.randn(4, 4)
    variables = SoftRounding(weight, quantizer(weight, 4))
    with pytest.raises(RecipeError, match="nan"):
        run(Learner({"w": variables}, lambda w, _: w["w"].sum() * float("nan"), AdaRound(iterations=2)).run())


def test_relative_result_does_not_depend_on_the_scale_of_the_loss() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    quant = quantizer(weight, 3)

    def learned(scale: float, relative: bool) -> torch.Tensor:
        variables = {"a": SoftRounding(weight, quant)}
        options = AdaRound(150, 3e-2, 1e3 if relative else 0.01, relative)

        def loss(weights, _):
            return scale * (inputs @ (weights["a"] - weight).T).square().mean()

        return run(Learner(variables, loss, options).run()).decided["a"]

    assert torch.equal(learned(1.0, True), learned(2.0**10, True))
    assert not torch.equal(learned(1.0, False), learned(2.0**-10, False))


def two(loss_of, options, **chosen):
    """Two weights, learned under keys of (name, bits)."""
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    variables = {("w", bits): SoftRounding(weight, quantizer(weight, bits)) for bits in (3, 4)}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator) @ torch.randn(8, 8, generator=generator)

    def loss(weights, iteration):
        return torch.stack([loss_of(x @ (w - weight).T) for w in weights.values()]).sum()

    return variables, run(Learner(variables, loss, options, **chosen).run())


def test_what_is_not_drawn_does_not_move() -> None:
    start = two(lambda y: y.square().mean(), AdaRound(iterations=0))[0]
    moved, result = two(lambda y: y.square().mean(), AdaRound(20, 1e-2, warmup=1), drawn=lambda iteration: [("w", 3)])
    assert torch.equal(moved["w", 4].parameter, start["w", 4].parameter)
    assert not torch.equal(moved["w", 3].parameter, start["w", 3].parameter)
    assert set(result.decided) <= {("w", 3)}


def test_the_regulariser_acts_on_what_is_drawn_alone() -> None:
    options = AdaRound(300, 1e-2, weight=1.0, warmup=0)
    moved, _ = two(lambda y: y.square().mean() * 0, options, drawn=lambda iteration: [("w", 3)])
    decided = {key: ((v.up() < 0.05) | (v.up() > 0.95)).float().mean() for key, v in moved.items()}
    assert decided["w", 3] > 0.8
    assert decided["w", 4] < 0.3


def test_what_is_decided_together_gets_one_verdict_from_the_judge() -> None:
    judged = []

    def judge(weights, probe):
        """Nearest first: of 3 bits learned rounding is better, of 4 bits worse."""
        judged.append(next(iter(weights))[1])
        return torch.tensor([1.0, 0.5, 1.0, 2.0][len(judged) - 1])

    variables, result = two(
        lambda y: y.square().mean(), AdaRound(30, 1e-2), together=lambda key: key[1], judge=judge, probes=1
    )
    assert judged == [3, 3, 4, 4]
    assert set(result.verdicts) == {3, 4}
    assert set(result.decided) == {("w", 3)}
    assert torch.equal(result.decided["w", 3], variables["w", 3].decided())


@pytest.mark.parametrize("start", [2.0, 0.1])
def test_losses_before_learning_that_are_known_are_not_judged_again(start: float) -> None:
    judged = []

    def judge(weights, probe):
        judged.append(weights)
        return torch.tensor(0.5)

    known = torch.tensor([start], dtype=torch.float64)
    _, result = two(lambda y: y.square().mean(), AdaRound(30, 1e-2), judge=judge, probes=1, start=known)
    assert len(judged) == 1
    assert result.verdict.start_loss == start
    assert bool(result.decided) is (start > 0.5)


def test_other_parameters_learn_beside_the_rounding() -> None:
    weight = torch.ones(2, 2)
    gain = torch.zeros((), requires_grad=True)
    run(
        Learner(
            {"w": SoftRounding(weight, quantizer(weight, 4))},
            lambda weights, _: (gain - 1).square() + weights["w"].sum() * 0,
            AdaRound(200, 1e-3, weight=0.0),
            others=[{"params": [gain], "lr": 5e-2}],
        ).run()
    )
    assert float(gain.detach()) == pytest.approx(1, abs=0.05)
