"""Gradients with checkpointing are those without: every part is computed again with the group of its own call."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dq_plugins.errors import TimestepError
from dq_plugins.timesteps import TimestepContext, TimestepGroups, attach_context

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])


class Scaled(nn.Module):
    """A layer whose factor belongs to the group; counts how often it ran."""

    def __init__(self, context: TimestepContext) -> None:
        super().__init__()
        self.linear, self.context, self.ran = nn.Linear(4, 4), context, 0
        self.register_buffer("table", torch.tensor([1.0, 3.0, 7.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.ran += 1
        return torch.tanh(self.linear(x) * self.table.index_select(0, self.context.index("g")).reshape(-1, 1))


class Denoiser(nn.Module):
    """Two blocks, the first of which is computed again where ``checkpointed`` says how."""

    def __init__(self) -> None:
        super().__init__()
        self.context = TimestepContext({"g": TimestepGroups((300.0, 600.0))})
        self.first, self.second = Scaled(self.context), Scaled(self.context)
        self.checkpointed: bool | None = None
        self.kept: list[Tensor] = []

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = sample
        for block in (self.first, self.second):
            h = block(h) if self.checkpointed is None else checkpoint(block, h, use_reentrant=self.checkpointed)
            self.kept.append(h)
        return h * h


def denoiser(reentrant: bool | None = None) -> Denoiser:
    torch.manual_seed(0)
    made = Denoiser()
    made.checkpointed = reentrant
    attach_context(made, made.context, "timestep")
    return made


def gradients(model: Denoiser, backward) -> list[Tensor]:
    model.zero_grad()
    backward(model)
    return [p.grad.clone() for p in model.parameters()]


def one_call(model: Denoiser) -> None:
    model(X.clone().requires_grad_(), torch.tensor([100, 900])).sum().backward()


def two_calls_then_two_backwards(model: Denoiser) -> None:
    a, b = (model(X.clone().requires_grad_(), torch.tensor(t)) for t in (100, 900))
    a.sum().backward()
    b.sum().backward()


def two_calls_then_one_backward(model: Denoiser) -> None:
    x = X.clone().requires_grad_()
    (model(x, torch.tensor(100)) * model(x, torch.tensor(900))).sum().backward()


def a_call_on_the_output_of_a_call(model: Denoiser) -> None:
    model(model(X.clone().requires_grad_(), torch.tensor(900)), torch.tensor(100)).sum().backward()


def a_loss_on_what_a_block_computes(model: Denoiser) -> None:
    model.kept.clear()
    for t in (900, 100):
        model(X.clone().requires_grad_(), torch.tensor(t))
    (model.kept[1].square().sum() + model.kept[3].square().sum()).backward()


def a_backward_in_another_thread(model: Denoiser) -> None:
    losses = [model(X.clone().requires_grad_(), torch.tensor(t)).sum() for t in (100, 900)]
    threads = [threading.Thread(target=loss.backward) for loss in losses]
    for thread in threads:
        thread.start()
        thread.join()


@KINDS
@pytest.mark.parametrize(
    "backward",
    [
        one_call,
        two_calls_then_two_backwards,
        two_calls_then_one_backward,
        a_call_on_the_output_of_a_call,
        a_loss_on_what_a_block_computes,
        a_backward_in_another_thread,
    ],
    ids=lambda f: f.__name__,
)
def test_gradients_are_those_without_checkpointing(backward, reentrant: bool) -> None:
    model = denoiser(reentrant)
    found, expected = gradients(model, backward), gradients(denoiser(), backward)
    plain = denoiser()
    backward(plain)
    assert model.first.ran == 2 * plain.first.ran, "nothing was computed again"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@KINDS
def test_the_whole_denoiser_may_be_computed_again(reentrant: bool) -> None:
    def backward(model: Denoiser) -> None:
        checkpoint(model, X.clone().requires_grad_(), torch.tensor(900), use_reentrant=reentrant).sum().backward()

    def plainly(model: Denoiser) -> None:
        model(X.clone().requires_grad_(), torch.tensor(900)).sum().backward()

    for a, b in zip(gradients(denoiser(False), backward), gradients(denoiser(), plainly), strict=True):
        torch.testing.assert_close(a, b)


@KINDS
def test_a_layer_called_after_backward_says_so(reentrant: bool) -> None:
    model = denoiser(reentrant)
    one_call(model)
    with pytest.raises(TimestepError, match="outside the denoiser's forward"):
        model.first(X)


def test_hooks_of_others_on_saved_tensors_are_called() -> None:
    packed, unpacked = [], []
    hooks = saved_tensors_hooks(lambda t: (packed.append(1), t.detach())[1], lambda t: (unpacked.append(1), t)[1])
    model = denoiser(False)
    with hooks:
        loss = model(X.clone().requires_grad_(), torch.tensor([100, 900])).sum()
    assert len(packed) > 3
    loss.backward()
    assert len(unpacked) > 3
    with save_on_cpu():
        found = gradients(model, one_call)
    for a, b in zip(found, gradients(denoiser(), one_call), strict=True):
        torch.testing.assert_close(a, b)


def test_a_saved_tensor_that_was_modified_is_still_an_error() -> None:
    class Careless(Denoiser):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            h = sample.exp()
            out = h * 2
            h.add_(1)
            return out

    model = Careless()
    attach_context(model, model.context, "timestep")
    with pytest.raises(RuntimeError, match="in-place operation"):
        model(X.clone().requires_grad_(), torch.tensor(5)).sum().backward()


def test_transformations_that_allow_no_hooks_work() -> None:
    model = denoiser()
    gradient = torch.func.grad(lambda x: model(x, torch.tensor(900)).sum())(X)
    x = X.clone().requires_grad_()
    model(x, torch.tensor(900)).sum().backward()
    torch.testing.assert_close(gradient, x.grad)


def test_a_higher_derivative_is_right() -> None:
    model, x = denoiser(), X.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x, torch.tensor(400)).sum(), x, create_graph=True)
    first.square().sum().backward()
    with model.context.select(400):
        plain = X.clone().requires_grad_()
        h = model.second(model.first(plain))
        (again,) = torch.autograd.grad((h * h).sum(), plain, create_graph=True)
    again.square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)
