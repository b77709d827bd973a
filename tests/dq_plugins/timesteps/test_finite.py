"""NaN and infinity among the arguments of a routed denoiser come out as NaN, or raise; as numbers never."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dq_plugins.errors import DQError
from dq_plugins.timesteps import TimestepContext, TimestepGroups, attach_context

BAD = [float("nan"), float("inf"), -float("inf")]


@dataclass
class Output:
    sample: Tensor
    count: int


class Swallowing(nn.Module):
    """Clips as quantizers do, so that nothing of what is not finite is left; answers in several forms."""

    form = "tensor"

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None, mask: Tensor | None = None):
        y = sample.nan_to_num(3.0, 4.0, -4.0) + timestep.reshape(-1, 1).nan_to_num(0.0)
        y = y if condition is None else y + condition.nan_to_num(1.0)
        return {"tensor": y, "tuple": (y, 3), "list": [y], "dict": {"y": y}, "class": Output(y, 3)}[self.form]


def routed(form: str = "tensor", **options: str) -> nn.Module:
    denoiser = Swallowing()
    denoiser.form = form
    attach_context(denoiser, TimestepContext({"g": TimestepGroups()}, "nearest", **options), "timestep")
    return denoiser


def bad_rows(y: Tensor) -> list[bool]:
    assert torch.equal(y.isnan().any(1), y.isnan().all(1))
    return y.isnan().all(1).tolist()


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    torch._dynamo.reset()  # many tests compile the forward of one class


X, T = torch.arange(6.0).reshape(3, 2), torch.tensor([5.0])


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("form", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_bad_sample_gives_nan_and_the_others_do_not_change(value, form, dtype):
    denoiser = routed()
    run = torch.compile(denoiser, backend="eager", fullgraph=True) if form == "compiled" else denoiser
    whole = run(X.to(dtype), T)
    x = X.to(dtype, copy=True)
    x[1, 0] = value
    y = run(x, T)
    assert bad_rows(y) == [False, True, False]
    assert torch.equal(y[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "class"])
def test_outputs_of_every_form_keep_it(form):
    x = X.clone()
    x[0, 0] = torch.nan
    output = routed(form)(x, T)
    found = output.sample if form == "class" else output["y"] if form == "dict" else output[0]
    assert bad_rows(found) == [True, False, False]
    assert type(output).__name__ == {"class": "Output"}.get(form, form)


def test_every_argument_counts_in_its_own_rows_or_for_all():
    denoiser = routed()
    condition = torch.ones(3, 2)
    condition[2] = torch.inf
    assert bad_rows(denoiser(X, T, condition)) == [False, False, True]
    assert bad_rows(denoiser(X, T, condition=condition[2:])) == [True] * 3
    context = torch.compile(denoiser, backend="eager")
    assert bad_rows(context(X, torch.tensor([1.0, torch.nan, 2.0]))) == [False, True, False]


def test_masks_may_hold_minus_infinity_and_nothing_else():
    denoiser = routed()
    mask = torch.zeros(3, 2)
    mask[1] = -torch.inf
    for run in (denoiser, torch.compile(denoiser, backend="eager", fullgraph=True)):
        assert bad_rows(run(X, T, None, mask)) == [False] * 3
        assert bad_rows(run(X, T, mask=-mask)) == [False, True, False]
        assert bad_rows(run(X, T, mask)) == [False, True, False]  # the place of the condition


@pytest.mark.parametrize("value", BAD)
def test_it_raises_where_that_is_asked_for(value):
    denoiser = routed(non_finite="error")
    x = X.clone()
    x[1, 0] = value
    with pytest.raises(DQError, match="sample that holds NaN or infinity"):
        denoiser(x, T)
    with pytest.raises(RuntimeError, match="sample that holds NaN or infinity"):
        torch.compile(denoiser, backend="eager", fullgraph=True)(x, T)
    assert bad_rows(denoiser(X, T)) == [False] * 3


def test_empty_batches_and_transformations_pass():
    denoiser = routed()
    assert denoiser(X[:0], T).shape == (0, 2)
    y = torch.func.vmap(lambda row: denoiser(row[None], T)[0])(torch.stack([X[0], torch.full((2,), torch.nan)]))
    assert bad_rows(y) == [False, True]
    with pytest.raises(DQError, match="'nan' or 'error'"):
        TimestepContext({}, non_finite="zero")
