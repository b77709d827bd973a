"""Integer layers against simulated ones on rare inputs: sizes, strides, dtypes, magnitudes, the limit of int32."""

from __future__ import annotations

import copy

import dq_torchao
import pytest
import torch
from dq_torchao.lowering import lower_layer, most_products
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchao_models import build, denoiser_plan

import dq_plugins as dq
from dq_plugins.affine import affine_parameters
from dq_plugins.plan import ActivationQuant, DynamicActivationQuant, LayerPlan, WeightQuant
from dq_plugins.quantized.layer import simulate_layer
from dq_plugins.timesteps import TimestepContext, TimestepGroups

CONTEXT = TimestepContext({"all": TimestepGroups((300.0, 700.0))})
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(CLOSE)
SUBNORMAL = 2.0**-149
"""The smallest float32 above zero."""


def plan_of(layer: nn.Module, reach: float = 3.0, *, dynamic: bool = False) -> LayerPlan:
    high = torch.tensor([reach, reach / 2, reach / 4])
    scale, zero_point = affine_parameters(-high / 2, high, 8, symmetric=False)
    largest = layer.weight.detach().float().flatten(1).abs().amax(1)
    weight = WeightQuant(8, affine_parameters(-largest, largest, 8, symmetric=True)[0])
    activation = DynamicActivationQuant(8) if dynamic else ActivationQuant(8, "all", scale, zero_point)
    return LayerPlan(type(layer).__name__.lower(), weight=weight, activation=activation, unquantized_reason=None)


def both(layer: nn.Module, plan: LayerPlan, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, str]:
    """Outputs simulated and in integers, and how the second really runs."""
    simulated, lowered = simulate_layer(copy.deepcopy(layer), plan, CONTEXT), copy.deepcopy(layer)
    state = lower_layer(lowered, plan, CONTEXT).state
    with torch.no_grad(), CONTEXT.select(timestep):
        return simulated(x), lowered(x), state


def assert_agree(layer: nn.Module, plan: LayerPlan, x: Tensor, timestep: Tensor) -> str:
    expected, found, state = both(layer, plan, x, timestep)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if expected.numel():
        held = expected.isfinite()  # float16 ends at 65504
        assert torch.equal(found.isfinite(), held)
        exact = expected.double().where(held, 0.0)
        # the product of both scales may be a subnormal, off by up to SUBNORMAL for each unit of the sum it multiplies
        subnormal = layer.weight[0].numel() * 255 * 127 * SUBNORMAL
        assert (found.double().where(held, 0.0) - exact).abs().max() <= CLOSE[x.dtype] * exact.abs().max() + subnormal
    return state


def made(kind: str, inputs: int, outputs: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(inputs + outputs)
    layer = nn.Linear(inputs, outputs) if kind == "linear" else nn.Conv2d(inputs, outputs, 3, padding=1)
    return layer.to(dtype).requires_grad_(False)


def shaped(kind: str, batch: int, inputs: int, dtype: torch.dtype) -> Tensor:
    shape = (batch, 4, inputs) if kind == "linear" else (batch, inputs, 5, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch)).to(dtype)


LAYOUTS = {
    "dense": lambda x: x,
    "permuted": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "constant": lambda x: torch.full_like(x, 1.3),
    "zero": torch.zeros_like,
    "subnormal": lambda x: x * 1e-40,
    "far outside": lambda x: x.sign() * 6e4,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["linear", "conv"]),
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(0, 3),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    dynamic=st.booleans(),
    per_sample=st.booleans(),
)
def test_integer_equals_simulated(layout, kind, dtype, batch, inputs, outputs, dynamic, per_sample):
    layer = made(kind, inputs, outputs, dtype)
    plan = plan_of(layer, dynamic=dynamic and kind == "linear")
    timestep = torch.linspace(100, 900, batch) if per_sample and batch else torch.tensor([500.0])
    x = LAYOUTS[layout](shaped(kind, batch, inputs, dtype))
    assert assert_agree(layer, plan, x, timestep) == "integer"


@settings(max_examples=60, deadline=None)
@example(reach=-4.0, weight=-32.0, dynamic=False)
@given(reach=st.floats(-38, 38), weight=st.floats(-38, 30), dynamic=st.booleans())
def test_magnitudes_from_the_smallest_to_the_largest(reach, weight, dynamic):
    if reach + weight > 36:
        return  # the product itself is beyond float32
    layer = nn.Linear(12, 7, bias=False).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    layer.weight.copy_((torch.rand(7, 12, generator=generator) - 0.5) * 10**weight)
    x = (torch.rand(3, 5, 12, generator=generator) - 0.3) * 10**reach
    assert_agree(layer, plan_of(layer, 10**reach, dynamic=dynamic), x, torch.tensor([500.0]))


def test_scales_that_overflow_float32_on_the_way_are_simulated():
    layer = made("linear", 12, 7, torch.float32)
    state = assert_agree(layer, plan_of(layer, 1e37), torch.rand(3, 12) * 1e37, torch.tensor([500.0]))
    assert state == "simulated"


@pytest.mark.parametrize("shape", [(6,), (3, 6), (1, 2, 3, 6), (2, 0, 6)])
def test_linear_inputs_of_any_rank(shape):
    layer = made("linear", 6, 5, torch.float32)
    assert assert_agree(layer, plan_of(layer), torch.randn(shape), torch.tensor([500.0])) == "integer"


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_without_a_batch(dtype):
    layer = made("conv", 6, 5, dtype)
    x = shaped("conv", 1, 6, dtype)[0]
    assert assert_agree(layer, plan_of(layer), x, torch.tensor([500.0])) == "integer"


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("timesteps", [[500.0], [100.0, 500.0]])
def test_sums_at_the_limit_of_int32_are_exact_and_one_more_is_refused(sign, bits, timesteps):
    scale = torch.full((1,), 2.0**-10)
    weight = WeightQuant(bits, scale)
    products = most_products(weight)
    activation = ActivationQuant(8, "all", scale.expand(3).clone(), torch.zeros(3, dtype=torch.int32))
    plan = LayerPlan("linear", weight=weight, activation=activation, unquantized_reason=None)
    if bits == 4:  # a million products are of no use to anyone: the bound is enough
        assert products == (2**31 - 1) // (255 * 8)
        return
    layer = nn.Linear(products, 2, bias=False).requires_grad_(False)
    layer.weight.fill_(-1000.0)  # code -128
    x = torch.full((len(timesteps), products), 1000.0 * sign)  # code 127 or -128
    _, found, state = both(layer, plan, x, torch.tensor(timesteps))
    exact = -128.0 * (127 if sign > 0 else -128) * products * 2.0**-20
    assert state == "integer"
    assert torch.allclose(found.double(), torch.full_like(found.double(), exact), rtol=1e-6)
    longer = nn.Linear(products + 1, 2, bias=False).requires_grad_(False)
    execution = lower_layer(longer, plan, CONTEXT)
    assert execution.state == "simulated"
    assert f"{products + 1} products" in execution.reason


@pytest.mark.parametrize("backend", ["simulate", "torchao", "brevitas"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_results_have_the_dtype_of_full_precision(backend, dtype):
    model = build()
    x, t = torch.randn(2, 4, 6, 6), torch.tensor([500.0])
    quantized = dq.apply(model, denoiser_plan(model), backend)
    seen: dict[str, torch.dtype] = {}
    for each, kind in ((model, "full"), (quantized, "quantized")):
        for name in ("conv_in", "up", "conv_out"):
            each.get_submodule(name).register_forward_hook(
                lambda module, args, y, key=f"{kind} {name}": seen.__setitem__(key, torch.as_tensor(y).dtype)
            )
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        assert quantized(x, t).dtype == model(x, t).dtype == dtype
    assert all(seen[f"quantized {name}"] == seen[f"full {name}"] for name in ("conv_in", "up", "conv_out"))
    with torch.no_grad():
        assert quantized(x, t).dtype == torch.float32


@pytest.mark.parametrize("backend", ["simulate", "torchao"])
def test_a_state_of_other_widths_is_refused(backend):
    model = build()
    wide = dq.apply(model, denoiser_plan(model), backend)
    narrow = dq.apply(model, denoiser_plan(model, act_bits=4), backend)
    with pytest.raises(RuntimeError, match="layer with other widths"):
        narrow.load_state_dict(wide.state_dict())
    again = dq.apply(model, denoiser_plan(model), backend)
    assert again.load_state_dict(wide.state_dict())


def test_a_state_of_other_widths_is_refused_for_tokens_too():
    layer = made("linear", 6, 5, torch.float32)
    states = []
    for bits in (8, 4):
        plan = plan_of(layer)
        plan.activation = DynamicActivationQuant(bits)
        states.append([copy.deepcopy(layer), copy.deepcopy(layer)])
        simulate_layer(states[-1][0], plan, CONTEXT)
        lower_layer(states[-1][1], plan, CONTEXT)
    for wide, narrow in zip(*states, strict=True):
        with pytest.raises(RuntimeError, match="layer with other widths"):
            narrow.load_state_dict(wide.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", ["simulate", "torchao", "brevitas"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_what_is_not_finite_comes_out_as_nan_or_raises(value, backend, per_sample):
    model = build()
    x, t = torch.randn(2, 4, 6, 6), torch.tensor([100.0, 500.0] if per_sample else [500.0])
    quantized = dq.apply(model, denoiser_plan(model), backend)
    whole = quantized(x, t)
    x[0, 0, 0, 0] = value
    found = quantized(x, t)
    assert bool(found[0].isnan().all())
    assert torch.equal(found[1], whole[1])
    with pytest.raises(dq.DQError, match="NaN or infinity"):
        dq.apply(model, denoiser_plan(model), backend, non_finite="error")(x, t)


def test_the_option_survives_saving(tmp_path):
    model = build()
    dq_torchao.save(dq.apply(model, denoiser_plan(model), non_finite="error"), tmp_path)
    with pytest.raises(dq.DQError, match="NaN or infinity"):
        dq_torchao.load(build(), tmp_path)(torch.full((1, 4, 6, 6), torch.nan), torch.tensor([500.0]))
