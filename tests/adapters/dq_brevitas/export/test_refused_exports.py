from __future__ import annotations

import pytest
import torch
from dq_brevitas import attach_timesteps, export_onnx_qcdq, export_torch, quantizers
from dq_brevitas.export.inference import check_exportable
from torch import nn

from dq_plugins.errors import TimestepError
from dq_plugins.timesteps import context_of


@pytest.fixture
def model(quantize, calibrate):
    return calibrate(attach_timesteps(quantize(quantizers.Int8ActPerTimestepFloat), 4))


@pytest.mark.parametrize("export", [export_torch, export_onnx_qcdq])
def test_a_timestep_that_would_become_a_constant_is_refused(export, model, calls):
    call = {**calls[0], "timestep": 500}
    with pytest.raises(TimestepError, match=r"timestep is 500.*freeze_timestep_group"):
        export(model, kwargs=call)


@pytest.mark.parametrize("export", [export_torch, export_onnx_qcdq])
def test_a_part_of_the_denoiser_is_refused_even_with_a_group_selected(export, model):
    with context_of(model).select(500.0), pytest.raises(TimestepError, match="not the denoiser"):
        export(nn.Sequential(model.up), (torch.randn(1, 16),))


def test_a_model_without_timestep_quantizers_needs_no_timestep():
    check_exportable(nn.Linear(2, 2), (torch.randn(1, 2),), {})
