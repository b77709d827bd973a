from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attention_models import HEADS, RECIPE, TOKENS, attention_calls_recorded, attention_denoiser
from torch import nn
from torch.nn import functional as F

import dq_plugins as dq
from dq_plugins.passes.attention import attention_sizes, quantized_attentions
from dq_plugins.passes.width_candidates import candidates_of
from dq_plugins.plan.attention import OPERANDS
from dq_plugins.quantized.attention import site_name
from dq_plugins.recipe import PassContext, Recipe, Step

BATCH, PIXELS, CHANNELS = 3, 36, 12


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = attention_denoiser()
    return denoiser, attention_calls_recorded(denoiser, tmp_path_factory.mktemp("calib"))


def planned(case, **options) -> dq.QuantPlan:
    return dq.make_plan(*case, RECIPE, options={"attention-ranges": options}, progress=False)


@pytest.mark.parametrize("observer", ["minmax", "by-width"])
@pytest.mark.parametrize("bits", [4, 6])
def test_candidates_are_what_the_pass_would_plan_at_their_width(case, bits: int, observer: str) -> None:
    plan, other = planned(case, observer=observer), planned(case, observer=observer, bits=bits)
    found = candidates_of(plan, PassContext(*case, plan.targets), (8,), (bits, 8, 16))
    assert found.attention.keys() == {site_name("near"), site_name("far")}
    for name, own in plan.attention.items():
        candidates = found.attention[site_name(name)]
        assert sorted(candidates) == [bits, 8]  # codes of 16 bits have no definition
        assert candidates[8] is own
        assert candidates[bits].rows == own.rows
        for operand in OPERANDS:
            one, two = candidates[bits].quantizers[operand], other.attention[name].quantizers[operand]
            assert torch.equal(one.scale, two.scale)
            assert torch.equal(one.zero_point, two.zero_point)


def test_what_stays_in_floating_point_has_no_candidates(case) -> None:
    plan = planned(case, leave=("far",))
    assert quantized_attentions(plan).keys() == {site_name("near")}
    assert candidates_of(plan, PassContext(*case, plan.targets), (8,), (8,)).attention.keys() == {site_name("near")}
    plan.attention.clear()
    assert candidates_of(plan, PassContext(*case, plan.targets), (8,), (8,)).attention == {}


def test_sizes_are_those_of_the_products(case) -> None:
    near, far = attention_sizes(PassContext(*case), [site_name("near"), site_name("far")]).values()
    rows = BATCH * HEADS * PIXELS * CHANNELS
    assert near == (3 * rows, 2 * rows * PIXELS, rows * PIXELS)
    assert far == (rows + 2 * BATCH * HEADS * TOKENS * CHANNELS, 2 * rows * TOKENS, rows * TOKENS)


class Alone(nn.Module):
    """A denoiser that attends itself, by keyword, with fewer channels in values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, sample, timestep):
        x = sample * (1 + timestep.float().reshape(-1, 1, 1) / 1000)
        return self.out(F.scaled_dot_product_attention(query=self.q(x), key=self.k(x), value=self.v(x)))


def test_a_denoiser_that_attends_itself_is_measured_and_planned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    denoiser = Alone().eval().requires_grad_(False)

    def sample(d: nn.Module) -> None:
        x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
        for t in (900.0, 100.0):
            x = x + 0.1 * d(sample=x, timestep=torch.full((2,), t))

    calib = dq.record(denoiser, sample, out=tmp_path, progress=False)
    steps = (*RECIPE.steps, Step("sensitivity", {"act_choices": (4, 8), "draws": 40, "image": False}))
    plan = dq.make_plan(denoiser, calib, Recipe("r", "", steps), progress=False)
    noise = plan.sensitivity.noise[site_name("")]["activation"]
    assert 0 < noise[8] < noise[4]
    (size,) = attention_sizes(PassContext(denoiser, calib), [site_name("")]).values()
    assert size == (2 * 5 * (6 + 6 + 2), 2 * 5 * 5 * (6 + 2), 2 * 5 * 5 * 2)
