from __future__ import annotations

import pytest
import torch

from dq_plugins.quantized.exact_state import ExactState


class Scaled(ExactState):
    exact_state = ("scale", "absent", "nothing")

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1 / 3]))
        self.register_buffer("nothing", None)
        self.register_buffer("other", torch.tensor([1 / 3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_named_buffers_keep_dtype_and_values_and_others_are_cast(dtype):
    module = torch.nn.Sequential(Scaled()).to(dtype)[0]
    assert (module.scale.dtype, module.other.dtype, module.nothing) == (torch.float32, dtype, None)
    assert torch.equal(module.scale, Scaled().scale)


def test_named_buffers_move_with_the_module():
    assert Scaled().to("meta", torch.float16).scale.is_meta
