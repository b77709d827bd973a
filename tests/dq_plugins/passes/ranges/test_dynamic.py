"""Layers whose tokens, or samples, are of very unlike size, and others: only the first want ranges of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dq_plugins as dq
from dq_plugins.errors import RecipeError
from dq_plugins.passes.width_candidates import candidates_of
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant
from dq_plugins.recipe import PassContext, Recipe, Step

LAYERS = {"alike", "unlike", "positive", "patch", "samples"}
SCHEDULE = (900.0, 700.0, 500.0, 300.0, 100.0)


class Tokens(nn.Module):
    """``sample [B, 16, 8]``; layer ``unlike`` sees tokens from 0.01 to 100, layer ``positive`` no negative value,
    convolution ``samples`` samples orders of magnitude apart, convolution ``patch`` some that are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.alike, self.unlike, self.positive = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 8)
        self.patch, self.samples = nn.Conv1d(16, 16, 1), nn.Conv1d(16, 16, 3, padding=1)
        self.register_buffer("sizes", torch.logspace(-2, 2, 16)[:, None])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = torch.tanh(sample) + timestep.reshape(-1, 1, 1) / 1e4
        both = torch.cat([x, -x], -1)  # as far to either side, so that a zero point would win nothing
        wide = self.alike(both) + self.unlike(both * self.sizes) / self.sizes
        size = 10 ** sample[:, :1, :1]  # [B, 1, 1]
        wide = wide + self.samples(x * size) / size + self.positive(x.abs() * self.sizes)
        return self.patch(torch.sin(10 * wide))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    torch.manual_seed(0)
    denoiser = Tokens().eval().requires_grad_(False)

    def sample(model: nn.Module) -> None:
        for run in range(4):
            x = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(run))
            for t in SCHEDULE:
                x = x + 0.1 * torch.tanh(model(sample=x, timestep=torch.full((4,), t)))

    return denoiser, dq.record(denoiser, sample, out=tmp_path_factory.mktemp("calib"), progress=False)


def make(case, *before: Step, act_bits: int = 6, symmetric_acts: bool = False, after: tuple = (), **options):
    ranges = (
        Step("timestep-groups", {"groups": 2}),
        Step("activation-ranges", {"observer": "minmax", "dynamic_gain": 3.0, "sample_bits": 4, **options}),
    )
    recipe = Recipe("r", "", (*before, Step("weight-ranges"), *ranges, *after))
    widths = {"act_bits": act_bits, "edge_bits": 2, "symmetric_acts": symmetric_acts}
    return dq.make_plan(*case, recipe, progress=False, **widths)


def dynamic(plan: dq.QuantPlan) -> dict[str, bool]:
    """Whether zero points are fixed, of the layers whose ranges are dynamic."""
    found = {name: layer.activation for name, layer in plan.layers.items()}
    return {name: quant.symmetric for name, quant in found.items() if isinstance(quant, DynamicActivationQuant)}


@pytest.mark.parametrize("before", [(), (Step("channel-balance"),)], ids=["plain", "balanced"])
@pytest.mark.parametrize("bits", [4, 8])
def test_measured_where_tokens_are_unlike_with_zero_points_where_those_win(case, bits, before):
    plan = make(case, *before, act_bits=bits, ranges="measured")
    assert {"unlike": True, "positive": False}.items() < dynamic(plan).items()
    assert set(dynamic(plan)) == {"unlike", "positive", "samples"}
    gains = plan.sections["activation-ranges"].data["dynamic_gain"]
    assert min(gains["unlike"], gains["samples"]) > 5 > 3 > max(gains["alike"], gains["patch"])


def test_without_zero_points_none_are_tried(case):
    assert dynamic(make(case, ranges="measured", symmetric_acts=True)) == dict.fromkeys(
        ("unlike", "positive", "samples"), True
    )


def test_the_gain_that_is_asked_for_decides(case):
    assert not dynamic(make(case, ranges="measured", dynamic_gain=200))
    assert set(dynamic(make(case, ranges="measured", dynamic_gain=-200))) == LAYERS


def test_narrow_inputs_of_convolutions_keep_their_groups(case):
    assert set(dynamic(make(case, act_bits=5, ranges="measured", sample_bits=6))) == {"unlike", "positive"}
    assert "samples" in dynamic(make(case, act_bits=6, ranges="measured", sample_bits=6))


class OneLoud(nn.Module):
    """Tokens with one value that is far from all others, and that nothing reads: it is best cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.layer.weight.data[:, 0] = 0

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = torch.sin(3 * sample + timestep.reshape(-1, 1, 1))
        return self.layer(torch.cat([4 + 0 * x[..., :1], x[..., 1:]], -1))


@pytest.mark.parametrize("bits", [3, 8])
def test_far_values_are_cut_off_where_codes_are_few(bits, tmp_path):
    torch.manual_seed(0)
    denoiser = OneLoud().eval().requires_grad_(False)

    def sample(model: nn.Module) -> None:
        x = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))
        for t in SCHEDULE:
            x = x + 0.1 * model(sample=x, timestep=torch.full((4,), t))

    calib = dq.record(denoiser, sample, out=tmp_path, progress=False)
    plan = make((denoiser, calib), act_bits=bits, ranges="measured", dynamic_gain=-100, sample_bits=2)
    assert (plan.layers["layer"].activation.clip < 0.7) == (bits == 3)


def test_dynamic_means_every_layer(case):
    plan = make(case, ranges="dynamic")
    assert dynamic(plan) == dict.fromkeys(LAYERS, False)
    assert all(layer.unquantized_reason is None for layer in plan.layers.values())


def test_static_is_the_default_and_as_before(case):
    assert make(case) == make(case, ranges="static")
    assert not dynamic(make(case))


def test_measuring_twice_decides_alike(case):
    assert make(case, ranges="measured") == make(case, ranges="measured")


def error(case, plan: dq.QuantPlan) -> float:
    model = dq.apply(case[0], plan, backend="simulate")
    with torch.no_grad():
        return float(sum((call.run(model) - call.output).square().sum() for call in case[1].calls()))


def test_the_output_is_closer_and_comes_back_from_disk(case, tmp_path):
    static, measured = make(case), make(case, ranges="measured")
    assert error(case, measured) < 0.9 * error(case, static)
    assert dq.QuantPlan.load(measured.save(tmp_path)) == measured
    assert "W8A6 dynamic" in repr(measured)
    assert measured.features["dynamic_ranges"] == ("positive", "samples", "unlike")


def test_corrections_keep_the_groups_that_the_ranges_would_have(case):
    plan = make(case, ranges="dynamic", after=(Step("bias-correction"),))
    for layer in plan.layers.values():
        assert (len(layer.bias_correction.values), layer.bias_correction.groups) == (2, "default")


def test_candidates_of_every_width_stay_dynamic(case):
    plan = make(case, ranges="measured")
    found = candidates_of(plan, PassContext(*case, plan.targets), (8,), (4, 6))
    own = plan.layers["positive"].activation
    assert found.activations["positive"] == {4: DynamicActivationQuant(4, symmetric=False), 6: own}
    assert all(isinstance(quant, ActivationQuant) for quant in found.activations["alike"].values())
    other = candidates_of(
        make(case, ranges="measured", symmetric_acts=True), PassContext(*case, plan.targets), (8,), (4,)
    )
    assert other.hash != found.hash


def test_statistics_alone_cannot_be_judged_on():
    from dq_plugins.quantized.sampled import SampledStatistics
    from dq_plugins.quantized.statistics import Collector

    with pytest.raises(RecipeError, match="recorded calls"):
        SampledStatistics(Collector(), {}, "timestep").spread(2)


def test_of_dynamic_ranges_the_share_of_the_extremes_is_learned(case):
    learn = Step("learned-ranges", {"learn": ("ranges", "scales", "corrections"), "passes": 4.0, "target": "block"})
    before, after = make(case, ranges="measured"), make(case, ranges="measured", after=(learn,))
    assert after.learned_ranges == LAYERS
    for name in ("unlike", "positive", "samples"):
        found, start = (plan.layers[name].activation for plan in (after, before))
        assert found == replace(start, clip=found.clip)
        assert found.clip <= 1
    assert any(after.layers[n].activation.clip < 1 for n in ("unlike", "samples", "positive"))
    assert error(case, after) <= error(case, before)
