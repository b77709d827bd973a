"""A layer whose forward another tool has replaced: the integer layer runs within it, or the report says why not."""

import functools
from types import MethodType

import dq_torchao
import pytest
import torch
from dq_torchao.layer import IntegerLayer
from dq_torchao.lowering import lower_layer
from dq_torchao.report import Execution
from dq_torchao.wrapped_forward import unwrapped_copy
from torch import Tensor, nn

from dq_plugins.timesteps import TimestepContext
from tests.support.torchao_models import GROUPS, layer_plan


class Box:
    """What a hook library keeps for a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.forward = layer.forward
        self.calls = 0

    def before(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x

    def new_forward(self, module: nn.Module, *args: Tensor) -> Tensor:
        return self.forward(*args)


def as_a_registry(layer: nn.Module) -> None:
    """The former forward is an attribute of an object in a closure."""
    box = Box(layer)

    def new_forward(module: nn.Module, x: Tensor) -> Tensor:
        return box.forward(box.before(x))

    layer.forward = functools.update_wrapper(functools.partial(new_forward, layer), layer.forward)


def as_a_hook_with_its_own_forward(layer: nn.Module) -> None:
    layer.forward = functools.partial(Box(layer).new_forward, layer)


def as_an_attribute_of_the_layer(layer: nn.Module) -> None:
    layer._old_forward = layer.forward

    def new_forward(module: nn.Module, *args: Tensor) -> Tensor:
        return module._old_forward(*args)

    layer.forward = functools.update_wrapper(functools.partial(new_forward, layer), layer._old_forward)


def twice(layer: nn.Module) -> None:
    as_a_registry(layer)
    as_an_attribute_of_the_layer(layer)


def in_a_closure(layer: nn.Module) -> None:
    old = layer.forward
    layer.forward = lambda x: old(x)


def in_a_default_value(layer: nn.Module) -> None:
    layer.forward = lambda x, old=layer.forward: old(x)


def in_a_partial(layer: nn.Module) -> None:
    layer.forward = functools.partial(lambda old, x: old(x), layer.forward)


def as_the_class_has_it(layer: nn.Module) -> None:
    layer.forward = MethodType(lambda self, x: nn.Linear.forward(self, x), layer)


def without_any(layer: nn.Module) -> None:
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)


def beside_an_attribute_that_it_does_not_use(layer: nn.Module) -> None:
    layer.former = layer.forward
    without_any(layer)


def over_a_closure(layer: nn.Module) -> None:
    in_a_closure(layer)
    as_an_attribute_of_the_layer(layer)


EXCHANGED = (as_a_registry, as_a_hook_with_its_own_forward, as_an_attribute_of_the_layer, twice)
FIXED = (
    in_a_closure,
    in_a_default_value,
    in_a_partial,
    as_the_class_has_it,
    without_any,
    beside_an_attribute_that_it_does_not_use,
    over_a_closure,
)
X = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))


def lowered(wrap=None) -> tuple[nn.Module, Tensor, list[nn.Module]]:
    """A lowered layer, its output, and the integer layers that ran."""
    torch.manual_seed(0)
    layer, context = nn.Linear(24, 16), TimestepContext({"all": GROUPS})
    if wrap is not None:
        wrap(layer)
    lower_layer(layer, layer_plan(layer), context)
    with context.select(500.0):
        return layer, *run(layer)


def run(layer: nn.Module) -> tuple[Tensor, list[nn.Module]]:
    ran: list[nn.Module] = []
    with pytest.MonkeyPatch.context() as patch:
        inner = IntegerLayer.padded
        patch.setattr(IntegerLayer, "padded", lambda self, x, wholly=False: (ran.append(self), inner(self, x))[1])
        return layer(X), ran


def report(layer: nn.Module) -> Execution:
    return dq_torchao.execution_report(nn.Sequential(layer))["0"]


@pytest.mark.parametrize("wrap", EXCHANGED)
def test_a_forward_that_a_tool_holds_as_an_attribute_is_exchanged(wrap) -> None:
    layer, y, ran = lowered(wrap)
    assert ran == [layer]
    assert report(layer).state == "integer"
    assert torch.equal(y, lowered()[1])


@pytest.mark.parametrize("wrap", FIXED)
def test_a_layer_whose_own_forward_would_never_run_is_simulated_and_says_why(wrap) -> None:
    layer, y, ran = lowered(wrap)
    assert ran == []
    assert report(layer).state == "simulated"
    assert "replaced on the instance" in report(layer).reason
    torch.testing.assert_close(y, lowered()[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wrap", [*EXCHANGED, in_a_closure, in_a_default_value])
def test_a_wrapper_put_on_an_integer_layer_runs_it(wrap) -> None:
    layer, _, _ = lowered()
    wrap(layer)
    with layer.context.select(500.0):
        assert run(layer)[1] == [layer]
    assert report(layer).state == "integer"


@pytest.mark.parametrize("wrap", [as_the_class_has_it, without_any])
def test_a_forward_put_on_an_integer_layer_that_hides_it_is_reported(wrap) -> None:
    layer, _, _ = lowered()
    wrap(layer)
    assert run(layer)[1] == []
    assert report(layer).state == "weight-only"
    assert "replaced on the instance" in report(layer).reason
    del layer.forward
    assert report(layer).state == "integer"


def test_a_copy_for_timing_runs_the_forward_of_its_class_and_leaves_the_layer_alone() -> None:
    layer = nn.Linear(24, 16)
    y, weight = layer(X), layer.weight
    without_any(layer)
    copied = unwrapped_copy(layer)
    assert torch.equal(copied(X), y)
    assert lower_layer(copied, layer_plan(layer), TimestepContext({"all": GROUPS})).state == "integer"
    assert layer.weight is weight
    assert type(layer) is nn.Linear
    assert "forward" in vars(layer)
