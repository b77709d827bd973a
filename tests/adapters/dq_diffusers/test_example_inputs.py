from __future__ import annotations

import diffusers
import pytest
import torch
from dq_diffusers.example_inputs import example_inputs
from tiny_configs import CONFIGS
from torch import nn

from dq_plugins.errors import TraceError

# The rest of the zoo is traced in test_families.py; these run with values, as a user would run them.
RUN = ["unet", "unet-text", "unet-text-sizes", "dit", "pixart", "sd3", "flux", "wan", "hunyuan-dit", "z-image"]


def build(name: str, **extra) -> nn.Module:
    cls, config = CONFIGS[name]
    torch.manual_seed(0)
    return getattr(diffusers, cls)(**{**config, **extra}).eval()


@pytest.mark.parametrize("name", RUN)
def test_the_denoiser_runs_on_its_example_inputs(name):
    model = build(name)
    inputs = example_inputs(model, batch=2, size=8, frames=2, text_length=5)
    with torch.no_grad():
        output = model(**inputs)[0]
    assert torch.isfinite(output[0]).all()


def test_sizes_come_from_the_config_or_the_caller():
    model = build("unet-text")
    assert example_inputs(model)["sample"].shape == (1, 4, 8, 8)
    inputs = example_inputs(model, batch=3, size=(16, 8), text_length=2)
    assert inputs["sample"].shape == (3, 4, 16, 8)
    assert inputs["timestep"].shape == (3,)
    assert inputs["encoder_hidden_states"].shape == (3, 2, 12)


def test_tensors_are_on_the_models_device_in_its_dtype():
    model = build("dit").to("meta", torch.bfloat16)
    inputs = example_inputs(model)
    assert inputs["hidden_states"].is_meta
    assert inputs["hidden_states"].dtype == torch.bfloat16
    assert inputs["class_labels"].dtype == torch.int64
    assert example_inputs(model, device="cpu")["hidden_states"].device.type == "cpu"


def test_conditions_appear_where_the_config_asks_for_them():
    assert "class_labels" not in example_inputs(build("unet"))
    assert example_inputs(build("unet", num_class_embeds=3))["class_labels"].shape == (1,)
    assert "added_cond_kwargs" not in example_inputs(build("unet-text"))
    added = example_inputs(build("unet-text-sizes"))["added_cond_kwargs"]
    assert {key: tuple(value.shape) for key, value in added.items()} == {"text_embeds": (1, 10), "time_ids": (1, 6)}
    assert "guidance" in example_inputs(build("flux"))
    assert "guidance" not in example_inputs(build("flux", guidance_embeds=False))


def test_an_unknown_required_argument_is_named():
    class Exotic(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, sample, timestep, weather): ...

    with pytest.raises(TraceError, match=r"Exotic\.forward requires the argument 'weather'"):
        example_inputs(Exotic())
