from __future__ import annotations

import threading

import pytest
import torch
from odd_denoisers import Obelisk, Quarry
from torch import nn

from dq_plugins.errors import TraceError
from dq_plugins.graph.meta_copy import empty_on, meta_copy


def copy_of(model: nn.Module) -> nn.Module:
    return meta_copy(model, empty_on("meta"))


def test_every_tensor_is_a_shape_and_the_original_keeps_its_own():
    model = Quarry()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    copied = copy_of(model)
    assert all(tensor.is_meta for tensor in copied.state_dict().values())
    assert {n: t.shape for n, t in copied.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert model.training
    assert not copied.training


def test_hooks_and_forwards_of_instances_stay_behind():
    model = Quarry()
    model.a.register_forward_hook(lambda *_: pytest.fail("the hook ran"))
    model.forward = lambda *_, **__: pytest.fail("the instance's forward ran")
    model.z.compile()
    copied = copy_of(model)
    inputs = {name: tensor.to("meta") for name, tensor in Quarry.inputs().items()}
    assert copied(**inputs).shape == (2, 3, 8, 8)
    assert "forward" in vars(model)
    assert len(model.a._forward_hooks) == 1


def test_tied_parameters_stay_tied_and_lists_of_modules_point_into_the_copy():
    model = Obelisk()
    model.slabs[1].mod.weight = model.slabs[0].mod.weight
    model.shortlist = [model.slabs[0]]
    copied = copy_of(model)
    assert copied.slabs[1].mod.weight is copied.slabs[0].mod.weight
    assert copied.shortlist[0] is copied.slabs[0]


def test_plain_tensors_are_copied_and_what_cannot_be_copied_is_shared():
    model = Quarry()
    model.note = (torch.ones(2, requires_grad=True) * 2, "kept")  # carries a graph: deepcopy would refuse
    model.lock = threading.Lock()
    copied = copy_of(model)
    assert torch.equal(copied.note[0], torch.full((2,), 2.0))
    copied.note[0].zero_()
    assert model.note[0].sum() == 4
    assert copied.lock is model.lock


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_the_hook_that_computes_a_weight_is_part_of_the_model():
    model = nn.utils.weight_norm(nn.Linear(3, 3))
    model.register_forward_pre_hook(lambda *_: pytest.fail("the hook ran"))
    copied = copy_of(model)
    assert [type(hook).__name__ for hook in copied._forward_pre_hooks.values()] == ["WeightNorm"]
    assert copied(torch.empty(1, 3, device="meta")).is_meta


def test_a_compiled_submodule_is_replaced_by_the_module_inside():
    model = Quarry()
    model.b = torch.compile(model.b)
    assert type(copy_of(model).b).__name__ == "Granite"


def test_lazy_and_script_modules_are_refused_by_name():
    with pytest.raises(TraceError, match=r"'0\.weight' has no shape"):
        copy_of(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(TraceError, match="'0' is a TorchScript module"):
        copy_of(nn.Sequential(torch.jit.script(nn.Linear(2, 2))))
