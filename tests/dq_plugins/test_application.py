import copy

import pytest
import torch
from denoisers import recorded, tiny_denoiser

import dq_plugins as dq
from dq_plugins.errors import PlanError, RegistryError


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    denoiser = tiny_denoiser()
    return denoiser, dq.make_plan(denoiser, recorded(denoiser, tmp_path_factory.mktemp("c")), "fast", progress=False)


def test_a_copy_is_quantized_unless_told_otherwise(case) -> None:
    denoiser, plan = case
    before = copy.deepcopy(denoiser.state_dict())
    dq.apply(denoiser, plan, backend="simulate")
    assert all(torch.equal(v, before[k]) for k, v in denoiser.state_dict().items())
    own = copy.deepcopy(denoiser)
    assert dq.apply(own, plan, backend="simulate", inplace=True) is own
    assert not torch.equal(own.enter.weight, denoiser.enter.weight)


def test_an_adapter_that_executes_nothing_names_those_that_do(case) -> None:
    with pytest.raises(RegistryError, match=r"'diffusers' does not execute plans.*simulate"):
        dq.apply(*case, backend="diffusers")


@pytest.mark.parametrize("backend", ["simulate", "torchao", "brevitas"])
def test_an_option_that_the_backend_lacks_is_named_beside_those_that_it_has(case, backend) -> None:
    with pytest.raises(PlanError, match=rf"{backend}' takes no option 'out_of_rang'; did you mean 'out_of_range'"):
        dq.apply(*case, backend=backend, out_of_rang="nearest")


def test_every_backend_gives_nearly_the_same(case) -> None:
    denoiser, plan = case
    x, t = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([501.0, 501.0])
    reference = dq.apply(denoiser, plan, backend="simulate")(x, t)
    for backend in ("torchao", "brevitas"):
        with torch.no_grad():
            output = dq.apply(denoiser, plan, backend=backend)(x, t)
        assert (output - reference).square().sum() < 1e-4 * reference.square().sum(), backend
