import pytest
import torch
from row_layouts import ORDERS, Layout, noise
from torch import nn

from dq_plugins.graph.row_order import find_row_orders
from dq_plugins.hooks import hooked


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("layout", ORDERS)
def test_where_samples_are_is_seen_whatever_the_batch(layout, batch):
    inputs = {"sample": noise(batch), "timestep": torch.tensor(500.0)}
    orders = find_row_orders(Layout(layout), inputs, "timestep", "sample", ["enter", "middle", "leave"])
    assert orders == {"enter": "first", "middle": ORDERS[layout], "leave": "first"}


class Conditioned(nn.Module):
    """Layers that a class, a mask, or nothing at all reaches; one runs in two orders; one takes single samples only."""

    def __init__(self, refuses: bool = False):
        super().__init__()
        self.refuses = refuses
        self.classes = nn.Embedding(3, 8)
        self.by_class, self.of_time, self.places, self.twice, self.idle = (nn.Linear(8, 8) for _ in range(5))
        self.folded = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, sample, timestep, label):
        if self.refuses and len(sample) > 1:
            raise ValueError("one at a time")
        e = self.by_class(self.classes(label)) + self.of_time(timestep[:, None].expand(-1, 8) / 1000)
        x = sample + e[:, None] + self.places(torch.eye(8)[: sample.shape[1]])
        x = self.twice(self.twice(x).transpose(0, 1)).transpose(0, 1)
        frames = x.transpose(0, 1).reshape(-1, 8, 1, 1)  # frames outside, samples inside
        return self.folded(frames).reshape(x.shape[1], len(x), 8).transpose(0, 1)


def conditioned(**options):
    torch.manual_seed(0)
    model = Conditioned(**options)
    inputs = {"sample": noise(2), "timestep": torch.tensor([500, 500]), "label": torch.tensor([1, 1])}
    return model, inputs


def test_conditions_count_and_what_no_sample_reaches_is_not_known():
    model, inputs = conditioned()
    names = ["by_class", "of_time", "places", "twice", "folded", "idle"]
    orders = find_row_orders(model, inputs, "timestep", "sample", names)
    assert list(orders.values()) == ["first", "first", None, "mixed", "fastest", None]


def test_the_largest_argument_is_the_sample_where_nobody_says():
    model, inputs = conditioned()
    assert find_row_orders(model, inputs, "timestep", "", ["folded"]) == {"folded": "fastest"}


def test_a_denoiser_that_takes_no_such_batch_leaves_it_open():
    model, inputs = conditioned(refuses=True)
    one = {name: value[:1] for name, value in inputs.items()}
    assert find_row_orders(model, one, "timestep", "sample", ["twice"]) == {"twice": None}


def test_nothing_is_left_behind():
    model, inputs = conditioned()
    before = {name: value.clone() for name, value in inputs.items()}
    state = torch.get_rng_state()
    find_row_orders(model.train(), inputs, "timestep", "sample", ["twice"])
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_two_calls_of_two_samples_tell_it_and_a_third_where_indices_are_among_the_arguments(batch):
    model, shapes = Layout("(S B) C"), []
    inputs = {"sample": noise(batch), "timestep": torch.tensor(500.0)}
    with hooked({"": model}, before=lambda _, args, kwargs: shapes.append(len(kwargs["sample"]))):
        find_row_orders(model, inputs, "timestep", "sample", ["middle"])
    assert shapes == [2, 2]
    model, inputs = conditioned()
    with hooked({"": model}, before=lambda _, args, kwargs: shapes.append(len(kwargs["sample"]))):
        find_row_orders(model, inputs, "timestep", "sample", ["by_class", "idle"])
    assert shapes[2:] == [2, 2, 2]


class OfThree(nn.Module):
    """Takes the batch that it was built for."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, sample, timestep):
        return self.layer(sample.reshape(3, 4, 8).transpose(0, 1)).transpose(0, 1) + timestep


def test_a_denoiser_of_a_batch_of_its_own_gets_it():
    inputs = {"sample": noise(3), "timestep": torch.tensor(500.0)}
    assert find_row_orders(OfThree(), inputs, "timestep", "sample", ["layer"]) == {"layer": "second"}
