"""What BinaryDM trained, in torchao's integer layers."""

from __future__ import annotations

import dq_torchao
import pytest
from binary_models import empty_plan, tiny_denoiser, tiny_inputs, trained
from safetensors.torch import load_file

import dq_plugins as dq
from dq_plugins.passes.binarization import to_plan, weight_size


@pytest.mark.parametrize(("act_bits", "state"), [(4, "integer"), (8, "integer"), (None, "weight-only")])
def test_integer_layers_compute_what_was_trained(act_bits, state):
    model, plan = trained(act_bits), empty_plan(tiny_denoiser())
    expected = model(**tiny_inputs()).detach()
    integer = dq.apply(model, to_plan(model, plan), backend="torchao")
    assert {layer.state for layer in dq_torchao.execution_report(integer).values()} == {state}
    # a code on a rounding boundary may move by one when a float sum before it rounds differently
    assert (integer(**tiny_inputs()) - expected).square().mean() < 1e-4 * expected.square().mean()


def test_packed_weights_on_disk_have_the_size_that_was_promised(tmp_path):
    model, plan = trained(channels=32), empty_plan(tiny_denoiser(channels=32))
    promised = weight_size(model).quantized
    dq_torchao.save(dq.apply(model, to_plan(model, plan), backend="torchao"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    weights = {name: t for name, t in tensors.items() if name.endswith(("weight", "weight_packed", "weight_scale"))}
    assert sum(t.nbytes for t in weights.values()) == promised
