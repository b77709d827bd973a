from __future__ import annotations

import pytest
import torch
from odd_denoisers import Obelisk, Quarry, TwoLayers, randomise
from torch import nn

from dq_plugins.errors import TimestepError, TraceError
from dq_plugins.graph import Partition, partition


@pytest.fixture(scope="module")
def quarry() -> Partition:
    return partition(Quarry(), Quarry.inputs())


@pytest.fixture(scope="module")
def obelisk() -> Partition:
    return partition(Obelisk(), Obelisk.inputs())


def test_a_unet_with_odd_names_is_taken_apart(quarry):
    assert (quarry.timestep, quarry.sample_argument) == ("noise_level", "noisy")
    assert quarry.temporal == {"alpha.0", "alpha.2", "b.film", "d.film", "f.film"}
    assert quarry.condition == {"m.index", "m.content"}
    assert quarry.mixed == quarry.constant == frozenset()
    assert quarry.sample == {
        "a",
        "c",
        "u",
        "z",
        "b.p",
        "b.q",
        "d.p",
        "d.q",
        "d.r",
        "m.ask",
        "m.back",
        "f.p",
        "f.q",
        "f.r",
    }


def test_a_transformer_that_mixes_time_and_class_is_taken_apart(obelisk):
    assert (obelisk.timestep, obelisk.sample_argument) == ("t", "tokens")
    assert obelisk.temporal == {"when"}
    assert obelisk.condition == {"what"}
    assert obelisk.mixed == {"slabs.0.mod", "slabs.1.mod"}
    assert obelisk.constant == {"place"}


def test_every_layer_is_in_exactly_one_part(quarry, obelisk):
    for part in (quarry, obelisk):
        parts = [part.temporal, part.condition, part.mixed, part.sample, part.constant]
        assert sorted(name for names in parts for name in names) == sorted(part.layers)


@pytest.mark.parametrize("model", [Quarry, Obelisk])
def test_running_the_denoiser_agrees_with_its_partition(model):
    part, denoiser, inputs = partition(model(), model.inputs()), randomise(model()).eval(), model.inputs()
    sample = inputs[part.sample_argument]

    seen: dict[str, torch.Tensor] = {}
    for name in part.layers:
        denoiser.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: seen.update({name: y}))

    def outputs(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            denoiser(**{**inputs, **changed})
        return dict(seen)

    before = outputs()
    after = outputs(**{part.sample_argument: 0.5 * sample + torch.rand(sample.shape)})
    assert {name for name in before if not torch.equal(before[name], after[name])} == part.sample
    after = outputs(**{part.timestep: inputs[part.timestep] / 2})
    assert {name for name in before if torch.equal(before[name], after[name])} >= part.condition | part.constant
    assert not any(torch.equal(before[name], after[name]) for name in part.temporal | part.mixed)


def test_layer_facts_read_off_the_code(obelisk):
    info = obelisk.layers["slabs.1.one"]
    assert (info.name, info.kind, info.type_name) == ("slabs.1.one", "linear", "Linear")
    assert (info.params, info.weight_shape, info.macs) == (16 * 32 + 32, (32, 16), 2 * 4 * 16 * 32)
    assert (info.input_shape, info.output_shape) == ((2, 4, 16), (2, 4, 32))
    assert (info.signature, info.block) == ("sample", "slabs.1")
    assert info.depends == {"tokens", "t", "kind"}
    assert (obelisk.layers["what"].kind, obelisk.layers["what"].input_shape) == ("embedding", (2,))


class Twice(TwoLayers):
    def forward(self, x, t):
        return self.body(x) + self.body(self.time(t))


def test_a_layer_used_twice_takes_the_union_and_counts_both():
    info = partition(Twice(), TwoLayers.inputs()).layers["body"]
    assert info.signature == "sample"
    assert info.macs == 2 * (2 * 4 * 4)


class Unusual(TwoLayers):
    def forward(self, x, level, hint):
        return self.body(hint) + self.time(level) + 0 * x


def test_unusual_arguments_are_named_by_the_caller():
    inputs = {"x": torch.zeros(2, 4), "level": torch.zeros(2, 4), "hint": torch.zeros(2, 4)}
    part = partition(Unusual(), inputs, timestep="level", sample="hint")
    assert (part.temporal, part.sample) == ({"time"}, {"body"})
    assert partition(Unusual(), inputs, timestep="level").sample == frozenset()
    with pytest.raises(TimestepError):
        partition(Unusual(), inputs)


def test_a_network_that_gives_something_else_has_a_sample_by_name_or_size():
    class Encoder(TwoLayers):
        def forward(self, hint, x, t):
            return self.body(x).sum() + hint.sum()

    class Residuals(TwoLayers):
        def forward(self, sample, hint, small, t):
            return (self.body(hint) + small.mean() + self.time(t)).sum(), torch.zeros_like(sample)

    hint = torch.zeros(8, 4)
    assert partition(Encoder(), {"hint": hint} | TwoLayers.inputs()).sample_argument == "x"
    inputs = {"sample": torch.zeros(2, 9), "hint": hint, "small": torch.zeros(2, 3), "t": torch.rand(8, 4)}
    part = partition(Residuals(), inputs)
    assert (part.sample_argument, part.sample, part.temporal) == ("hint", {"body"}, {"time"})


def test_a_network_that_no_sample_reaches_is_refused():
    class Clock(TwoLayers):
        def forward(self, x, t):
            return self.time(t)

    with pytest.raises(TraceError, match="no argument can be the noisy sample"):
        partition(Clock(), TwoLayers.inputs())


def test_the_timestep_may_be_inside_another_argument():
    class Batch(TwoLayers):
        def forward(self, batch):
            return self.body(batch["x"]) + self.time(batch["t"])

    class Keywords(TwoLayers):
        def forward(self, **batch):
            return self.body(batch["x"]) + self.time(batch["t"])

    part = partition(Batch(), {"batch": TwoLayers.inputs()}, timestep="batch.t")
    assert (part.temporal, part.sample, part.sample_argument) == ({"time"}, {"body"}, "batch.x")
    assert partition(Keywords(), TwoLayers.inputs(), timestep="t").temporal == {"time"}


def test_a_second_time_argument_is_no_condition():
    class MeanFlow(TwoLayers):
        def __init__(self):
            super().__init__()
            self.end, self.text = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, t, r, text):
            return self.body(x) + self.time(t) + self.end(r) + self.text(text)

    part = partition(MeanFlow(), TwoLayers.inputs() | {"r": torch.rand(2, 4), "text": torch.rand(2, 4)})
    assert (part.temporal, part.mixed, part.condition) == ({"time"}, {"end"}, {"text"})


def test_the_timestep_may_be_a_number_under_an_unusual_name():
    class Numbered(TwoLayers):
        def forward(self, x, level):
            return self.body(x) + self.time(level.reshape(1, 1).expand(1, 4).float())

    part = partition(Numbered(), {"x": torch.zeros(2, 4), "level": 3}, timestep="level")
    assert part.temporal == {"time"}


class Pooling(TwoLayers):
    """A learned query, projected, attends over the sample: its product with the keys is not a layer."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 4))
        self.ask = nn.Linear(4, 4)

    def forward(self, x, t):
        keys = self.body(x)
        scores = self.ask(self.query) @ keys.transpose(0, 1)
        return x + scores.softmax(-1) @ keys + self.time(t)


def test_a_constant_activation_is_not_taken_for_a_weight():
    part = partition(Pooling(), TwoLayers.inputs())
    assert part.constant == {"ask"}
    assert set(part.layers) == {"time", "body", "ask"}
