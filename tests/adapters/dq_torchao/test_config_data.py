from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import dq_torchao
import pytest
from dq_torchao import CheckpointConfig, PlanConfig, TimestepInt8Config, serializable
from dq_torchao.config_data import config_from_json
from torchao.core.config import AOBaseConfig, config_from_dict, config_to_dict
from torchao_models import Denoiser, denoiser_plan

from dq_plugins.errors import DQError


def configs() -> list[AOBaseConfig]:
    model = Denoiser()
    plan = denoiser_plan(model)
    dq_torchao.apply(model, plan)
    return [TimestepInt8Config(groups=3, step="convert"), PlanConfig(plan), model.dq_checkpoint]


@pytest.mark.parametrize("index", range(3))
def test_every_config_of_ours_is_data(index):
    config = configs()[index]
    data = config_to_dict(config)
    assert config_from_dict(data) == config
    assert config_from_json(data, type(config)) == config
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("extra", [{}, {"a_field_of_the_future": 1}])
def test_a_newer_version_says_so(index, extra):
    data = config_to_dict(configs()[index])
    data["_version"] = 2
    data["_data"] |= extra
    with pytest.raises(DQError, match="newer dq-plugins"):
        config_from_json(data, type(configs()[index]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own, about the same
        with pytest.raises(ValueError, match="newer dq-plugins"):
            config_from_dict(data)


@pytest.mark.parametrize("version", ["1", None, True, 1.5])
def test_a_version_that_is_no_number_is_refused(version):
    data = config_to_dict(TimestepInt8Config())
    data["_version"] = version
    with pytest.raises(DQError, match="version"):
        config_from_json(data, TimestepInt8Config)


def test_a_config_of_another_class_or_form_is_refused():
    data = config_to_dict(TimestepInt8Config())
    with pytest.raises(DQError, match="expected was a CheckpointConfig"):
        config_from_json(data, CheckpointConfig)
    with pytest.raises(DQError, match="list"):
        config_from_json([], CheckpointConfig)
    with pytest.raises(DQError, match="damaged"):
        config_from_json({"_type": "TimestepInt8Config"}, TimestepInt8Config)


def test_torchao_can_build_nothing_but_configs_by_name():
    # config_from_dict calls what the module has under a name that comes from a file
    public = {name: value for name, value in vars(serializable).items() if not name.startswith("__")}
    assert all(inspect.isclass(value) and issubclass(value, AOBaseConfig) for value in public.values())
    assert set(public) == set(serializable.__all__)
