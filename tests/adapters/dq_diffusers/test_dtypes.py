from __future__ import annotations

import dq_torchao
import torch
from diffusers_models import unet
from dq_diffusers.dtypes import main_dtype
from torchao_models import corrected_plan


def test_tables_of_the_quantizer_do_not_count_however_many_there_are():
    model = unet()
    plan = corrected_plan(model)
    simulated = list(plan.layers)[::2]
    for name in simulated:
        plan.layers[name].activation.bits = 16  # tables under the names that simulated layers give them
    dq_torchao.apply(model, plan)
    kept = {name: torch.float32 for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert len(kept) > 100
    tables = {name: dtype for name, dtype in kept.items() if name.split(".")[-1] not in ("weight", "bias")}
    assert main_dtype({**tables, "conv_norm_out.weight": torch.bfloat16}) == torch.bfloat16
