from __future__ import annotations

import copy
import threading

import dq_torchao
import pytest
import torch
from dq_torchao import LayerFilter, TimestepInt8Config, linear_and_conv2d
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao_models import Denoiser, build, sqnr

from dq_plugins.errors import CalibrationError, DQError, PlanError, RegistryError, TimestepError
from dq_plugins.timesteps import context_of

TIMESTEPS = (900.0, 700.0, 500.0, 300.0, 100.0)


def inputs(timestep: float, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(2, 4, 8, 8, generator=generator) * (1 + timestep / 100)  # the range moves with t
    return {"sample": sample, "timestep": torch.tensor(timestep)}


def calibrated(**options: object) -> Denoiser:
    model = build()
    quantize_(model, TimestepInt8Config(step="prepare", **options), filter_fn=linear_and_conv2d)
    for seed in range(2):
        for t in TIMESTEPS:
            model(**inputs(t, seed))
    return model


def only_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


def test_prepare_sample_convert_of_some_layers():
    model, reference = build(), build()
    quantize_(model, TimestepInt8Config(step="prepare", groups=3), LayerFilter(only_linear))
    for t in TIMESTEPS:
        assert torch.equal(model(**inputs(t)), reference(**inputs(t)))  # still full precision
    quantize_(model, TimestepInt8Config(step="convert"), linear_and_conv2d)
    report = dq_torchao.execution_report(model)
    others = {name: e.reason for name, e in report.items() if e.state == "full precision"}
    assert {name for name, e in report.items() if e.state == "integer"} == {"time", "up", "down"}
    assert others == dict.fromkeys(("conv_in", "conv_out"), "it was not among the layers to quantize")
    assert len(context_of(model).groups["default"]) == 3
    for t in TIMESTEPS:
        assert sqnr(reference(**inputs(t)), model(**inputs(t))) > 30


def test_more_groups_make_less_error_at_four_bits():
    reference, models = build(), {}
    for groups in (1, 5):
        models[groups] = calibrated(groups=groups, act_bits=4)
        quantize_(models[groups], TimestepInt8Config(step="convert"), linear_and_conv2d)
    error = {
        groups: sum(float((reference(**inputs(t)) - model(**inputs(t))).pow(2).sum()) for t in TIMESTEPS[2:])
        for groups, model in models.items()
    }
    assert error[5] < 0.5 * error[1]


def test_a_denoiser_that_torchao_has_quantized_is_told():
    told = r"this Denoiser is quantized already: 'up' is or holds a torchao\..* full-precision denoiser"
    model = build()
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "up")
    with pytest.raises(PlanError, match=told):
        quantize_(model, TimestepInt8Config(step="prepare"), linear_and_conv2d)
    model = calibrated()
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "up")
    with pytest.raises(PlanError, match=told):
        quantize_(model, TimestepInt8Config(step="convert"), linear_and_conv2d)


def test_convert_takes_the_layers_that_are_prepared_and_selected():
    model = calibrated()
    quantize_(model, TimestepInt8Config(step="convert"), LayerFilter(only_linear))
    report = dq_torchao.execution_report(model)
    states = {"conv_in": "full precision", "conv_out": "full precision", "time": "integer", "up": "integer"}
    assert {name: report[name].state for name in states} == states
    assert report["conv_in"].reason == "the filter of quantize_ did not select it"
    model(**inputs(500.0))
    quantize_(model, TimestepInt8Config(step="convert"), linear_and_conv2d)  # the rest, from the same calibration
    whole = calibrated()
    quantize_(whole, TimestepInt8Config(step="convert"), linear_and_conv2d)
    assert dq_torchao.execution_report(model) == dq_torchao.execution_report(whole)
    assert torch.equal(model(**inputs(500.0)), whole(**inputs(500.0)))


def test_statistics_do_not_depend_on_the_order_of_calls():
    plans = []
    for order in (TIMESTEPS, TIMESTEPS[::-1]):
        model = build()
        dq_torchao.prepare(model, [model.up, model.conv_in], TimestepInt8Config(groups=2))
        for seed in range(2):
            for t in order:
                model(**inputs(t, seed))
        plans.append(dq_torchao.convert(model))
    assert plans[0].hash == plans[1].hash


def test_samples_with_their_own_timesteps_count_for_those():
    together, apart = build(), build()
    for model in (together, apart):
        dq_torchao.prepare(model, [model.conv_in], TimestepInt8Config(groups=2))
    low, high = inputs(100.0), inputs(900.0)
    sample = torch.cat([low["sample"], high["sample"]])
    together(sample=sample, timestep=torch.tensor([100.0, 100.0, 900.0, 900.0]))
    apart(**low)
    apart(**high)
    dq_torchao.convert(together)
    dq_torchao.convert(apart)
    assert torch.equal(together.conv_in.act_scale, apart.conv_in.act_scale)
    assert together.conv_in.act_scale[1] > 3 * together.conv_in.act_scale[0]


def test_other_schedules_of_the_same_range_work_and_far_timesteps_are_refused():
    model = calibrated()
    quantize_(model, TimestepInt8Config(step="convert"), linear_and_conv2d)
    model(**inputs(950.0))
    model(**inputs(420.0))
    with pytest.raises(TimestepError, match="1500"):
        model(**inputs(1500.0))


def test_a_layer_that_never_ran_is_kept_with_the_reason():
    model = build()
    model.unused = nn.Linear(3, 3)
    quantize_(model, TimestepInt8Config(step="prepare"), linear_and_conv2d)
    model(**inputs(500.0))
    quantize_(model, TimestepInt8Config(step="convert"), linear_and_conv2d)
    execution = dq_torchao.execution_report(model)["unused"]
    assert (execution.state, execution.reason) == ("full precision", "it did not run during calibration")


def test_convert_without_prepare_says_so():
    with pytest.raises(CalibrationError, match="was not prepared"):
        quantize_(build(), TimestepInt8Config(step="convert"), linear_and_conv2d)


def test_convert_without_sampling_says_so():
    model = build()
    quantize_(model, TimestepInt8Config(step="prepare"), linear_and_conv2d)
    with pytest.raises(CalibrationError, match="has not run since"):
        quantize_(model, TimestepInt8Config(step="convert"), linear_and_conv2d)


def test_model_without_a_timestep_says_so():
    with pytest.raises(TimestepError):
        quantize_(nn.Sequential(nn.Linear(2, 2)), TimestepInt8Config(step="prepare"), linear_and_conv2d)


def test_nan_names_layer_and_timestep():
    model = build()
    quantize_(model, TimestepInt8Config(step="prepare"), linear_and_conv2d)
    bad = inputs(700.0)
    bad["sample"][0, 0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"layer 'conv_in' at timestep 700: \d+ of"):
        model(**bad)


def test_copy_of_a_prepared_denoiser_is_refused():
    with pytest.raises(CalibrationError, match="convert it first"):
        copy.deepcopy(calibrated())


@pytest.mark.parametrize("options", [{"step": "quantize"}, {"groups": 0}, {"act_bits": 9}, {"weight_bits": 1}])
def test_wrong_options_are_refused(options):
    with pytest.raises(DQError, match="TimestepInt8Config"):
        TimestepInt8Config(**options)


@pytest.mark.parametrize("part", [None, "time"], ids=["whole", "a part"])
def test_a_denoiser_compiled_in_place_is_calibrated_as_it_is_written_and_compiled_again(part: str | None):
    torch.compiler.reset()
    model, plain = build(), calibrated()
    module = model if part is None else model.get_submodule(part)
    module.compile(backend="eager")
    compiled = module._compiled_call_impl
    model(**inputs(500.0))
    quantize_(model, TimestepInt8Config(step="prepare"), filter_fn=linear_and_conv2d)
    assert module._compiled_call_impl is None
    for seed in range(2):
        for t in TIMESTEPS:
            model(**inputs(t, seed))
    for each in (model, plain):
        quantize_(each, TimestepInt8Config(step="convert"), linear_and_conv2d)
    assert module._compiled_call_impl is compiled
    with torch.no_grad():
        for t in TIMESTEPS:
            torch.testing.assert_close(model(**inputs(t)), plain(**inputs(t)))


def test_threads_calibrate_one_denoiser_together():
    model, errors = build(), []
    quantize_(model, TimestepInt8Config(step="prepare"), filter_fn=linear_and_conv2d)

    def sample(seed: int) -> None:
        try:
            for t in TIMESTEPS[seed:] + TIMESTEPS[:seed]:
                model(**inputs(t, seed))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=sample, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = calibrated()
    assert errors == []
    for each in (model, alone):
        quantize_(each, TimestepInt8Config(step="convert"), linear_and_conv2d)
    for t in TIMESTEPS:
        assert torch.equal(model(**inputs(t)), alone(**inputs(t)))


def test_a_denoiser_in_a_wrapper_of_torch_compile_is_quantized_inside():
    torch.compiler.reset()
    model, plain = build(), calibrated()
    compiled = torch.compile(model, backend="eager")
    quantize_(compiled, TimestepInt8Config(step="prepare"), linear_and_conv2d)
    for seed in range(2):
        for t in TIMESTEPS:
            compiled(**inputs(t, seed))
    quantize_(compiled, TimestepInt8Config(step="convert"), linear_and_conv2d)
    quantize_(plain, TimestepInt8Config(step="convert"), linear_and_conv2d)
    assert context_of(compiled) is context_of(model) is not None
    assert set(dq_torchao.execution_report(model)) == set(dq_torchao.execution_report(plain))
    with torch.no_grad():
        for t in TIMESTEPS:
            torch.testing.assert_close(compiled(**inputs(t)), plain(**inputs(t)))


def test_the_recipe_decides_and_is_known_before_anything_is_sampled():
    with pytest.raises(RegistryError, match="rangs"):
        dq_torchao.prepare(build(), [], TimestepInt8Config(recipe="rangs"))
    plans = {}
    for recipe in ("ranges", "fast"):
        plans[recipe] = dq_torchao.convert(calibrated(recipe=recipe, act_bits=4, groups=3))
        assert plans[recipe].recipe == recipe
    assert not torch.equal(*(plan.layers["up"].activation.scale for plan in plans.values()))


def test_first_and_last_layers_are_found_and_stay_wide():
    plan = dq_torchao.convert(calibrated(weight_bits=4, act_bits=4))
    assert {name: plan.layers[name].width for name in ("conv_in", "up", "conv_out")} == {
        "conv_in": "W8A8",
        "up": "W4A4",
        "conv_out": "W8A8",
    }
