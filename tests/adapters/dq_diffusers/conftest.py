"""A tiny U-Net, quantized and on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import dq_torchao
import pytest
from diffusers import UNet2DModel
from diffusers_models import unet
from torchao_models import denoiser_plan

from dq_plugins.plan import QuantPlan


class SavedUNet(NamedTuple):
    """A full-precision U-Net, the same quantized, its plan, and a folder with all of them.

    Attributes:
        folder: ``float`` and ``quantized`` were written by ``save_pretrained``, ``plan`` by the plan.
    """

    full: UNet2DModel
    quantized: UNet2DModel
    plan: QuantPlan
    folder: Path


@pytest.fixture(scope="package")
def saved_unet(tmp_path_factory) -> SavedUNet:
    folder = tmp_path_factory.mktemp("quantizer")
    model = unet()
    plan = denoiser_plan(model)
    quantized = dq_torchao.apply(copy.deepcopy(model), plan)
    model.save_pretrained(folder / "float")
    quantized.save_pretrained(folder / "quantized")
    plan.save(folder / "plan")
    return SavedUNet(model, quantized, plan, folder)
