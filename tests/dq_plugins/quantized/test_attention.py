from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from attention_models import SCHEDULE, AttentionDenoiser, attention_denoiser, attention_inputs
from torch import nn
from torch.nn import functional as F

from dq_plugins.errors import DQError
from dq_plugins.plan import ActivationQuant, AttentionPlan
from dq_plugins.quantized.attention import (
    ObservedAttention,
    QuantizedAttention,
    attention_calls,
    attention_of_codes,
    quantize_attention,
    simulated_attention,
)
from dq_plugins.timesteps import TimestepContext, TimestepGroups, attach_context


def operands(*shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def exactly() -> QuantizedAttention:
    return QuantizedAttention(nn.Identity(), nn.Identity(), nn.Identity())


@pytest.mark.parametrize("keys", [1, 7, 300])
def test_probabilities_alone_cost_less_than_half_a_code(keys: int) -> None:
    (q, _, _), (k, v, _) = operands(2, 3, 5, 8), operands(2, 3, keys, 8, seed=1)
    error = exactly()(q, k, v) - F.scaled_dot_product_attention(q, k, v)
    assert float(error.abs().max()) <= v.abs().max() / 255 * keys**0.5
    if keys == 1:
        assert torch.allclose(exactly()(q, k, v), v.expand_as(q))


def test_the_definition_by_loops() -> None:
    q, k, v = operands(4, 6)
    y = attention_of_codes(q, k, v, None, 0.3)
    for row in range(4):
        scores = [0.3 * float(q[row] @ k[n]) for n in range(4)]
        codes = [round(255 * torch.tensor(s - max(scores)).exp().item()) for s in scores]
        expected = sum(c * v[n] for n, c in enumerate(codes)) / sum(codes)
        assert max(codes) == 255
        assert torch.allclose(y[row], expected, atol=1e-5)


MASKS = {
    "bool": torch.tensor([[True, True, False, True, False]]),
    "added": torch.tensor([[0.0, -1.0, 2.0, -torch.inf, 0.5]]),
    "by sample and head": torch.randn(2, 4, 5, 5),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_those_of_pytorch(mask: str) -> None:
    q, k, v = operands(2, 4, 5, 8)
    ours, theirs = (f(q, k, v, attn_mask=MASKS[mask]) for f in (exactly(), F.scaled_dot_product_attention))
    assert float((ours - theirs).abs().max()) < 0.02


def test_causal_attention_shared_heads_and_a_scale_are_those_of_pytorch() -> None:
    q, (k, v, _) = operands(2, 4, 5, 8)[0], operands(2, 2, 5, 8, seed=1)
    options = {"is_causal": True, "scale": 0.7, "enable_gqa": True}
    ours, theirs = (f(q, k, v, **options) for f in (exactly(), F.scaled_dot_product_attention))
    assert float((ours - theirs).abs().max()) < 0.02


def test_a_row_without_keys_is_zero() -> None:
    q, k, v = operands(1, 1, 3, 4)
    assert not exactly()(q, k, v, attn_mask=torch.zeros(3, 3, dtype=torch.bool)).any()


def test_dropout_is_refused() -> None:
    with pytest.raises(DQError, match="evaluation mode"):
        exactly()(*operands(1, 1, 3, 4), dropout_p=0.1)


def test_gradients_pass_straight_through() -> None:
    q, k, v = (x.requires_grad_() for x in operands(2, 3, 5, 8))
    grads = [
        torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v)) for f in (exactly(), F.scaled_dot_product_attention)
    ]
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, rtol=0.05, atol=0.05)


GROUPS = TimestepGroups((300.0, 700.0))
PLAN = AttentionPlan(
    **{
        name: ActivationQuant(8, "all", torch.tensor([0.5, 1.0, 2.0]) * s, torch.tensor([0, 5, -9], dtype=torch.int32))
        for name, s in (("query", 0.02), ("key", 0.03), ("value", 0.01))
    }
)


def routed(*, seed: int = 0) -> AttentionDenoiser:
    denoiser, context = attention_denoiser(seed), TimestepContext({"all": GROUPS})
    for module in (denoiser.near, denoiser.far):
        quantize_attention(module, simulated_attention(module, PLAN, context))
    attach_context(denoiser, context, "timestep")
    return denoiser


def test_ranges_follow_the_timestep_of_every_sample() -> None:
    denoiser = routed()
    mixed = attention_inputs(torch.tensor(SCHEDULE))
    together = denoiser(**mixed)
    for i in range(3):
        alone = denoiser(**{name: x[i : i + 1] for name, x in mixed.items()})
        assert torch.allclose(together[i], alone[0], atol=1e-5)
    one = routed()
    one.near.quantized_attention.query.scale[1] *= 3
    changed = (one(**mixed) - together).flatten(1).abs().amax(1) > 1e-6
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("freezing", [False, True])
def test_compiles_to_one_graph_that_follows_the_timestep(freezing: bool) -> None:
    denoiser = routed()
    with torch._inductor.config.patch(freezing=freezing), torch.no_grad():
        torch._dynamo.reset()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        compiled = torch.compile(denoiser, fullgraph=True)
        for t in SCHEDULE:
            inputs = attention_inputs(t)
            assert torch.allclose(compiled(**inputs), denoiser(**inputs), atol=2e-3)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


def test_threads_share_a_denoiser_and_others_are_left_alone() -> None:
    denoiser, inputs = routed(), [attention_inputs(t) for t in SCHEDULE]
    expected = [denoiser(**each) for each in inputs]
    found: dict[int, bool] = {}

    def run(i: int) -> None:
        found[i] = all(torch.equal(denoiser(**inputs[i]), expected[i]) for _ in range(20))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    plain = attention_denoiser()
    outside = plain(**inputs[0])
    for thread in threads:
        thread.start()
    assert all(torch.equal(plain(**inputs[0]), outside) for _ in range(20))
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(3), True)


def test_an_exception_leaves_nothing_behind() -> None:
    denoiser, q = routed(), operands(1, 1, 3, 4)
    with pytest.raises(RuntimeError):
        denoiser(**attention_inputs() | {"text": torch.ones(3, 2, 99)})
    assert torch.equal(F.scaled_dot_product_attention(*q), F.scaled_dot_product_attention(*operands(1, 1, 3, 4)))
    assert type(denoiser.near).__name__ == "SelfOrCross"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_attends_as_the_original(copied) -> None:
    denoiser, inputs = routed(), attention_inputs()
    twin = copied(denoiser)
    assert torch.equal(twin(**inputs), denoiser(**inputs))
    twin.near.quantized_attention.query.scale *= 3
    assert not torch.equal(twin(**inputs), denoiser(**inputs))


class Root(nn.Module):
    """Attends itself, and is routed itself."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(sample, sample, sample)


def test_the_denoiser_itself_may_attend() -> None:
    root, context = Root(), TimestepContext({"all": GROUPS})
    quantize_attention(root, simulated_attention(root, PLAN, context))
    attach_context(root, context, "timestep")
    x = operands(2, 5, 8)[0]
    plain = F.scaled_dot_product_attention(x, x, x)
    for model in (root, copy.deepcopy(root), pickle.loads(pickle.dumps(root))):
        y = model(x, torch.tensor(500.0))
        assert not torch.equal(y, plain)
        assert torch.equal(y, root(x, torch.tensor(500.0)))


def test_wrappers_of_the_forward_come_and_go() -> None:
    denoiser, inputs = routed(), attention_inputs()
    expected = denoiser(**inputs)
    own = denoiser.near.forward
    denoiser.near.forward = lambda *args, **kwargs: own(*args, **kwargs)
    assert torch.equal(denoiser(**inputs), expected)
    del denoiser.near.forward
    assert torch.equal(denoiser(**inputs), expected)


def test_closing_makes_the_module_as_it_was() -> None:
    denoiser, inputs = attention_denoiser(), attention_inputs()
    before, kind = denoiser(**inputs), type(denoiser.near)
    with quantize_attention(denoiser.near, ObservedAttention()):
        assert torch.equal(denoiser(**inputs), before)  # what is observed is PyTorch's own
    with quantize_attention(denoiser.near, exactly()):
        assert not torch.equal(denoiser(**inputs), before)
    assert torch.equal(denoiser(**inputs), before)
    assert type(denoiser.near) is kind


def test_modules_that_attend_are_found_with_how_often() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x) + F.scaled_dot_product_attention(x, x, x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.twice = Root(), Twice()
            self.stock = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.inner(self.inner(x, x), x)
            return self.twice(x) + self.stock(x, x, x)[0]

    assert attention_calls(Model(), {"x": torch.ones(2, 5, 8)}) == {"inner": 1, "twice": 2, "stock": 0}
    assert attention_calls(attention_denoiser(), attention_inputs()) == {"near": 1, "far": 1}
