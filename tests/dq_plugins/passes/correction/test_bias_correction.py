from __future__ import annotations

import pytest
import torch
from denoisers import SCHEDULE, recorded, tiny_denoiser
from torch import nn

import dq_plugins as dq
from dq_plugins.hooks import hooked
from dq_plugins.passes.correction.mean_error import MeanErrors, OutputMeans, channel_means
from dq_plugins.quantized.layer import LayerState
from dq_plugins.quantized.run import QuantizedRun
from dq_plugins.recipe import Recipe, Step
from dq_plugins.timesteps import TimestepGroups


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, recorded(denoiser, tmp_path_factory.mktemp("calib"), batch=4)


RANGES = (Step("timestep-groups", {"groups": 3}), Step("activation-ranges", {"observer": "minmax"}))


def make(case, *steps: Step, weight_bits: int = 3, act_bits: int | None = 8, **options) -> dq.QuantPlan:
    recipe = Recipe("r", "", (Step("weight-ranges"), *(RANGES if act_bits else ()), *steps))
    return dq.make_plan(
        *case, recipe, weight_bits=weight_bits, act_bits=act_bits, edge_bits=3, progress=False, **options
    )


def drift(case, plan: dq.QuantPlan) -> float:
    """Mean error of the output's channels at each timestep, root mean square."""
    model = dq.apply(case[0], plan, backend="simulate")
    with torch.no_grad():
        errors = [(call.run(model) - call.output).mean((0, 2, 3)) for call in case[1].calls()]
    return float(torch.stack(errors).square().mean().sqrt())


def test_the_mean_error_of_the_output_falls(case) -> None:
    assert drift(case, make(case, Step("bias-correction"))) < 0.3 * drift(case, make(case))


@pytest.mark.parametrize("table", [(), (Step("temporal-table", {"storage": "int8"}),)])
def test_errors_are_those_of_the_applied_plan(case, table) -> None:
    plan = make(case, *table)
    corrected = make(case, *table, Step("bias-correction"))
    full, applied = case[0], dq.apply(case[0], plan, backend="simulate")
    names = [n for n, layer in corrected.layers.items() if layer.bias_correction is not None]
    layers, means, found = [{n: m.get_submodule(n) for n in names} for m in (full, applied)], {}, {n: [] for n in names}

    def keep(name, args, kwargs, output):
        means[name] = channel_means(layers[0][name], output)

    def correct(name, args, kwargs, output):
        error = means[name] - channel_means(layers[1][name], output)
        found[name].append((plan.groups["default"].of(float(call.timestep[0])), error))
        return output + error.mean(0).reshape(-1, *[1] * (output.dim() - 2))

    with torch.no_grad(), hooked(layers[0], after=keep), hooked(layers[1], after=correct):
        for call in case[1].calls():
            call.run(full), call.run(applied)
    for name in names:
        for group, row in enumerate(corrected.layers[name].bias_correction.values):
            errors = torch.cat([e for g, e in found[name] if g == group]).double()
            chance = errors.var(0, correction=0) / len(errors)
            signal = errors.mean(0).square().mean()
            assert torch.allclose(row.double(), errors.mean(0) * signal / (signal + chance.mean()), atol=1e-6)


def test_groups_have_corrections_of_their_own_or_share_one(case) -> None:
    own, shared = (make(case, Step("bias-correction", {"groups": g})) for g in (True, False))
    for name, layer in own.layers.items():
        assert layer.bias_correction.values.shape == (3, case[0].get_submodule(name).weight.shape[0])
        assert layer.bias_correction.groups == layer.activation.groups
        assert len(shared.layers[name].bias_correction.values) == 1
    assert drift(case, own) < drift(case, shared)


def test_weights_alone_are_corrected_too(case) -> None:
    plan = make(case, Step("bias-correction"), act_bits=None)
    assert all(layer.bias_correction.groups is None for layer in plan.layers.values())
    assert drift(case, plan) < 0.8 * drift(case, make(case, act_bits=None))


def test_an_exact_denoiser_needs_no_correction(case) -> None:
    plan = make(case, Step("bias-correction"), weight_bits=16, act_bits=16)
    assert max(float(layer.bias_correction.values.abs().max()) for layer in plan.layers.values()) < 0.02


def test_measuring_again_starts_from_none(case) -> None:
    once, twice = make(case, Step("bias-correction")), make(case, Step("bias-correction"), Step("bias-correction"))
    for name, layer in once.layers.items():
        assert torch.equal(layer.bias_correction.values, twice.layers[name].bias_correction.values)


def test_it_survives_disk_and_the_denoiser_is_left_alone(case, tmp_path) -> None:
    before = {name: value.clone() for name, value in case[0].state_dict().items()}
    plan = make(case, Step("bias-correction"))
    assert dq.QuantPlan.load(plan.save(tmp_path)) == plan
    assert all(torch.equal(value, before[name]) for name, value in case[0].state_dict().items())
    assert not any(m._forward_hooks for m in case[0].modules())


def balanced(case, *steps: Step, samples: int = 48, **options) -> dq.QuantPlan:
    recipe = Recipe("r", "", (Step("channel-balance", {"samples": samples}), Step("weight-ranges"), *RANGES, *steps))
    return dq.make_plan(*case, recipe, weight_bits=4, act_bits=8, progress=False, **options)


@pytest.mark.parametrize(("samples", "runs"), [(48, 1), (20, 2)])
def test_calls_that_balance_ran_are_not_run_again(case, samples, runs) -> None:
    calls = []

    def count(*steps: Step) -> int:
        calls.clear()
        with hooked({"": case[0]}, before=lambda *call: calls.append(call[0])):
            balanced(case, *steps, samples=samples)
        return len(calls)

    assert count(Step("bias-correction")) - count() == runs * len(case[1])


def test_what_balance_saw_gives_the_same_corrections(case, tmp_path, monkeypatch) -> None:
    shared = balanced(case, Step("bias-correction"))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dq_plugins.passes.correction.bias_correction.BiasCorrecting.run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            balanced(case, Step("bias-correction"), workdir=tmp_path)
    assert balanced(case, Step("bias-correction"), workdir=tmp_path) == shared


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, sample, timestep):
        return self.layer(sample)


class Shift(nn.Module):
    """Makes an output wrong by a known amount at each timestep."""

    def __init__(self, shift: dict[float, list[float]], run: QuantizedRun) -> None:
        super().__init__()
        self.shift, self.context = shift, run.context

    def forward(self, y):
        return y + torch.tensor(self.shift[float(self.context.selection.timestep[0])])


def test_a_planted_shift_is_found_for_each_group(tmp_path) -> None:
    torch.manual_seed(0)
    full = OneLayer().requires_grad_(False)
    shift = {t: [i + 1.0, -i] for i, t in enumerate(SCHEDULE)}

    def sample(denoiser):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
        for t in SCHEDULE:
            x = x + 0.1 * torch.cat([denoiser(sample=x, timestep=torch.tensor(t)), x[:, :1]], 1)

    calib = dq.record(full, sample, out=tmp_path, progress=False)
    run = QuantizedRun(full, ["layer"], {}, "timestep")
    states = {"layer": LayerState(correction=Shift(shift, run))}
    groups = {"layer": TimestepGroups.one_per_timestep(calib.timesteps)}
    found = MeanErrors(run, states, groups, OutputMeans(run.modules))
    for call in calib.calls():
        found.see(call)
    expected = -torch.tensor([shift[t] for t in sorted(shift)])
    assert torch.allclose(found.table("layer"), expected, atol=1e-5)


def test_chance_is_not_corrected() -> None:
    run = QuantizedRun(OneLayer(), ["layer"], {}, "timestep")
    found = MeanErrors(run, {}, {"layer": TimestepGroups(())}, OutputMeans(run.modules))
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    found._add("layer", torch.tensor([1.0]), noise)
    pure_chance = found.table("layer").square().mean() / noise.mean(0).square().mean()
    found._add("layer", torch.tensor([1.0]), noise + 5)
    assert pure_chance < 0.5
    assert torch.allclose(found.table("layer"), noise.mean(0)[None] + 2.5, rtol=0.3)


@pytest.mark.parametrize(
    ("layer", "shape", "samples"),
    [(nn.Linear(3, 4), (2, 5, 3), 2), (nn.Linear(3, 4), (3,), 1), (nn.Conv1d(3, 4, 1), (2, 3, 5), 2)],
)
def test_means_are_of_channels(layer, shape, samples) -> None:
    means = channel_means(
        layer, layer(torch.randn(shape)) * 0 + layer.bias.reshape(4, *[1] * (isinstance(layer, nn.Conv1d)))
    )
    assert means.shape == (samples, 4)
    assert torch.allclose(means, layer.bias.expand(samples, 4))
