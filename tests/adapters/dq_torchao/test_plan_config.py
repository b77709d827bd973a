from __future__ import annotations

import copy
import json

import dq_torchao
import pytest
import torch
from dq_torchao import PlanConfig, plan_config
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import quantize_
from torchao_models import TIMESTEPS, Denoiser, build, denoiser_plan

from dq_plugins.errors import DQError, PlanError


def through_json(config: PlanConfig) -> PlanConfig:
    return config_from_dict(json.loads(json.dumps(config_to_dict(config), allow_nan=False)))


def test_a_plan_inside_the_config_survives_json():
    plan = denoiser_plan(build())
    config = PlanConfig(plan, out_of_range="nearest", uniform_timesteps=True)
    read = through_json(config)
    assert read == config
    assert read.resolve() == plan
    assert read.options() == {"out_of_range": "nearest", "temporal_fallback": "error", "uniform_timesteps": True}


def test_a_folder_stays_a_folder(tmp_path):
    plan = denoiser_plan(build())
    plan.save(tmp_path)
    read = through_json(PlanConfig(tmp_path))
    assert read.plan == str(tmp_path)
    assert read.resolve() == plan


def test_quantize_applies_the_whole_plan():
    model, reference = build(), build()
    plan = denoiser_plan(model)
    dq_torchao.apply(reference, plan)
    quantize_(model, PlanConfig(plan))  # torchao's own filter selects linear layers only; the plan has convolutions
    x = torch.randn(2, 4, 8, 8)
    for t in TIMESTEPS:
        assert torch.equal(model(x, torch.tensor(t)), reference(x, torch.tensor(t)))
    assert dq_torchao.execution_report(model) == dq_torchao.execution_report(reference)


def test_another_plan_in_the_folder_is_refused(tmp_path):
    plan = denoiser_plan(build())
    plan.save(tmp_path)
    config = PlanConfig(tmp_path)
    other = copy.deepcopy(plan)
    other.seed = 1
    other.save(tmp_path)
    with pytest.raises(PlanError, match="replaced or altered"):
        config.resolve()


def test_a_tampered_plan_inside_is_refused():
    data = config_to_dict(PlanConfig(denoiser_plan(build())))
    data["_data"]["plan"]["record"]["groups"]["all"]["edges"] = [400.0, 700.0]
    with pytest.raises(PlanError, match="replaced or altered"):
        config_from_dict(data).resolve()


@pytest.mark.parametrize("damage", ["", "!!!", "AAAA"])
def test_damaged_tensors_are_refused(damage):
    data = config_to_dict(PlanConfig(denoiser_plan(build())))
    data["_data"]["plan"]["tensors"] = damage
    with pytest.raises(PlanError, match="damaged"):
        config_from_dict(data).resolve()


def test_what_is_no_plan_is_refused():
    with pytest.raises(PlanError, match="folder of a saved plan or a QuantPlan"):
        PlanConfig(8)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="without its hash"):
        PlanConfig({})
    with pytest.raises(PlanError, match="no plan at"):
        PlanConfig("no/such/folder")


def test_a_plan_too_large_to_carry_names_the_way_out(monkeypatch):
    monkeypatch.setattr(plan_config, "EMBEDDED_LIMIT", 100)
    with pytest.raises(PlanError, match="give the folder"):
        PlanConfig(denoiser_plan(build()))


def test_a_plan_of_other_weights_is_refused():
    model = Denoiser()
    with pytest.raises(PlanError, match="other weights"):
        quantize_(model, PlanConfig(denoiser_plan(build())))


def test_outside_quantize_the_error_says_what_to_call():
    with pytest.raises(DQError, match=r"dq_torchao\.apply"):
        plan_config.handle_layer(nn.Linear(2, 2), PlanConfig(denoiser_plan(build())))


def test_its_name_is_short_enough_to_read():
    assert len(repr(PlanConfig(denoiser_plan(build())))) < 200
