import torch
from denoisers import SCHEDULE, example, tiny_denoiser

from dq_plugins.passes.temporal.block import temporal_block
from dq_plugins.passes.temporal.features import feature_error


def test_holds_exactly_the_layers_of_t() -> None:
    block = temporal_block(tiny_denoiser(), example())
    assert block.layers == {"p", "q", "body.0.beta", "body.1.beta"}
    assert set(block.tables.values()) == {"body.0.beta", "body.1.beta"}


def test_features_equal_those_of_the_denoiser() -> None:
    denoiser = tiny_denoiser()
    block = temporal_block(denoiser, example())
    seen = {}
    for name in block.tables.values():
        denoiser.get_submodule(name).register_forward_hook(lambda _m, _i, out, n=name: seen.__setitem__(n, out))
    features = block.features(block.points(SCHEDULE))
    for row, t in enumerate(SCHEDULE):
        denoiser(torch.randn(2, 2, 8, 8), torch.tensor([t, t]))
        for node, name in block.tables.items():
            torch.testing.assert_close(features[node][row], seen[name])


def test_weights_can_be_replaced_and_differentiated() -> None:
    block = temporal_block(tiny_denoiser(), example())
    weight = block.weights()["p.weight"].clone().requires_grad_(True)
    features = block.features(block.points(SCHEDULE), {"p.weight": weight})
    sum(f.square().sum() for f in features.values()).backward()
    assert weight.grad.abs().sum() > 0


def test_no_block_where_t_reaches_no_layer_alone() -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Conv2d(2, 2, 1)

        def forward(self, sample, timestep):
            return self.a(sample * timestep.reshape(-1, 1, 1, 1))

    assert temporal_block(Mixed(), example()) is None


def test_feature_error_of_swapped_rows_is_a_mismatch() -> None:
    e = torch.eye(4)
    error = feature_error({"a": e}, {"a": e[[1, 0, 2, 3]]})
    assert error.mismatch == 0.5
    assert error.cosine == 0.5
    assert feature_error({"a": e}, {"a": e * 3}).cosine == 0
