from __future__ import annotations

import copy
import json

import dq_torchao
import pytest
import torch
from dq_torchao import LayerFilter, PlanConfig, linear_and_conv2d, plan_config
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import quantize_
from torchao_models import TIMESTEPS, Denoiser, build, denoiser_plan

from dq_plugins.errors import PlanError
from dq_plugins.plan import QuantPlan


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


def by_filter(plan: QuantPlan) -> Denoiser:
    model = build()
    config = PlanConfig(plan)
    quantize_(model, config, config.filter())
    return model


def by_hand(plan: QuantPlan) -> Denoiser:
    model = build()
    quantize_(model, PlanConfig(plan), linear_and_conv2d)
    return model


@pytest.mark.parametrize("quantize", [by_filter, by_hand])
def test_quantize_with_a_filter_that_selects_all_is_apply(quantize):
    plan = denoiser_plan(build())
    model, reference = quantize(plan), dq_torchao.apply(build(), plan)
    x = torch.randn(2, 4, 8, 8)
    for t in TIMESTEPS:
        assert torch.equal(model(x, torch.tensor(t)), reference(x, torch.tensor(t)))
    assert dq_torchao.execution_report(model) == dq_torchao.execution_report(reference)
    assert model.dq_checkpoint == reference.dq_checkpoint


def test_what_the_filter_leaves_out_stays_and_is_reported_and_can_follow_later(tmp_path):
    plan = denoiser_plan(build())
    model, reference = build(), dq_torchao.apply(build(), plan)
    quantize_(model, PlanConfig(plan), LayerFilter(lambda module, _: isinstance(module, nn.Linear)))
    report = dq_torchao.execution_report(model)
    assert (report["conv_in"].state, report["conv_in"].width) == ("full precision", "W8A8")
    assert report["conv_in"].reason == "the filter of quantize_ did not select it"
    assert report["up"].state == "integer"
    assert report["time"].reason == "the temporal block stays as it is"
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(500.0)
    dq_torchao.save(model, tmp_path)
    assert torch.equal(dq_torchao.load(build(1), tmp_path)(x, t), model(x, t))
    quantize_(model, PlanConfig(plan), linear_and_conv2d)
    assert dq_torchao.execution_report(model) == dq_torchao.execution_report(reference)
    assert torch.equal(model(x, t), reference(x, t))


def test_another_plan_for_a_quantized_denoiser_is_refused():
    plan = denoiser_plan(build())
    model = by_hand(plan)
    other = copy.deepcopy(plan)
    other.seed = 1
    with pytest.raises(PlanError, match="quantized already"):
        quantize_(model, PlanConfig(other), linear_and_conv2d)


def test_another_plan_in_the_folder_is_refused(tmp_path):
    plan = denoiser_plan(build())
    plan.save(tmp_path)
    config = PlanConfig(tmp_path)
    other = copy.deepcopy(plan)
    other.seed = 1
    other.save(tmp_path)
    with pytest.raises(PlanError, match="altered"):
        config.resolve()


def test_a_tampered_plan_inside_is_refused():
    data = config_to_dict(PlanConfig(denoiser_plan(build())))
    data["_data"]["plan"]["record"]["record"]["groups"]["all"]["edges"] = [400.0, 700.0]
    with pytest.raises(PlanError, match="altered"):
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
    with pytest.raises(PlanError, match="a plan was expected there"):
        PlanConfig("no/such/folder")


def test_a_plan_too_large_to_carry_names_the_way_out(monkeypatch):
    monkeypatch.setattr(plan_config, "EMBEDDED_LIMIT", 100)
    with pytest.raises(PlanError, match="give the folder"):
        PlanConfig(denoiser_plan(build()))


def test_a_plan_of_other_weights_is_refused():
    model = Denoiser()
    with pytest.raises(PlanError, match="other weights"):
        quantize_(model, PlanConfig(denoiser_plan(build())), linear_and_conv2d)


def test_its_name_is_short_enough_to_read():
    assert len(repr(PlanConfig(denoiser_plan(build())))) < 200
