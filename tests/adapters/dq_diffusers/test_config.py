from __future__ import annotations

import json

import pytest
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from diffusers_models import class_pipeline
from dq_diffusers import DQConfig
from dq_diffusers.recording import sampler
from dq_torchao import PlanConfig, TimestepInt8Config
from torchao.quantization import Int8WeightOnlyConfig

import dq_plugins as dq
from dq_plugins.errors import DQError
from dq_plugins.plan.step_policy import StepPolicy, with_policy


def through_json(config: DQConfig) -> DQConfig:
    return DiffusersAutoQuantizer.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))


def test_a_plan_in_a_folder_or_inside(saved_unet):
    for plan in (saved_unet.plan, saved_unet.folder / "plan", str(saved_unet.folder / "plan")):
        config = DQConfig(plan, out_of_range="nearest")
        assert config.config == PlanConfig(plan, out_of_range="nearest")
        assert through_json(config).config.resolve() == saved_unet.plan
        assert through_json(config).quant_method == "dq"


def test_configs_of_dq_torchao(saved_unet):
    for inner in (TimestepInt8Config(groups=3), saved_unet.quantized.dq_checkpoint):
        assert DQConfig(inner).config is inner
        config = through_json(DQConfig(config=inner, dtypes={"": "bfloat16"}))
        assert (config.config, config.dtypes) == (inner, {"": "bfloat16"})


def test_the_short_name_is_read_as_well(saved_unet):
    data = DQConfig(saved_unet.plan).to_dict() | {"quant_method": "dq"}
    assert DiffusersAutoQuantizer.from_dict(data).config == PlanConfig(saved_unet.plan)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "either a plan"),
        ({"plan": "plan/", "config": TimestepInt8Config()}, "either a plan"),
        ({"config": TimestepInt8Config(), "out_of_range": "nearest"}, "out_of_range go with a plan"),
        ({"config": Int8WeightOnlyConfig()}, "diffusers.TorchAoConfig"),
        ({"config": TimestepInt8Config(), "dtypes": {"": "nn"}}, "dtypes are names"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, match):
    with pytest.raises(DQError, match=match):
        DQConfig(**arguments)


@pytest.mark.parametrize("damage", [None, {}, [], {"_type": "Int8WeightOnlyConfig", "_version": 1, "_data": {}}])
def test_damaged_data_is_refused(saved_unet, damage):
    data = DQConfig(saved_unet.plan).to_dict() | {"config": damage}
    with pytest.raises(DQError, match="quantization config"):
        DQConfig.from_dict(data)
    with pytest.raises(DQError, match="quantization config is damaged"):
        DQConfig.from_dict(DQConfig(saved_unet.plan).to_dict() | {"dtypes": ["bfloat16"]})


def test_its_name_is_short_enough_to_read(saved_unet):
    assert len(repr(DQConfig(saved_unet.plan))) < 250


def test_config_json_of_a_quantized_denoiser_holds_the_step_policy_that_its_plan_follows(tmp_path):
    pipe = class_pipeline()
    denoiser = pipe.transformer.requires_grad_(False)
    calib = dq.record(denoiser, sampler(pipe, images=2, steps=4), tmp_path / "calib", progress=False)
    plan = dq.make_plan(denoiser, calib, "fast", progress=False)
    for policy in (StepPolicy(1, 2), StepPolicy()):
        model, folder = dq.apply(denoiser, with_policy(plan, policy), "torchao"), tmp_path / str(policy.first)
        model.save_pretrained(folder)
        saved = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert StepPolicy.from_config(saved) == (policy if policy.first else None)
        loaded = type(denoiser).from_pretrained(folder)
        loaded.save_pretrained(folder / "again")
        assert json.loads((folder / "again" / "config.json").read_text())["quantization_config"] == saved
