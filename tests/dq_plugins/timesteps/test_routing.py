import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dq_plugins.errors import TimestepError
from dq_plugins.timesteps import (
    TimestepContext,
    TimestepGroups,
    attach_context,
    context_of,
    detach_context,
    select_for_input,
)

GROUPS = TimestepGroups((300.0, 600.0), low=0.0, high=1000.0)


class Denoiser(nn.Module):
    """Multiplies by the table entry of the current group, so that its output shows which group was selected."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.tensor([1.0, 10.0, 100.0]))
        self.context: TimestepContext | None = None

    def forward(self, sample: Tensor, timestep: Tensor, scale: float = 1.0) -> Tensor:
        assert self.context is not None
        return self.linear(sample) * scale * self.table.index_select(0, self.context.index("g")).view(-1, 1)


def routed(out_of_range: str = "error") -> Denoiser:
    torch.manual_seed(0)
    denoiser = Denoiser().eval().requires_grad_(False)
    denoiser.context = TimestepContext({"g": GROUPS}, out_of_range)
    attach_context(denoiser, denoiser.context, "timestep")
    return denoiser


def factor(denoiser: nn.Module, x: Tensor, *args, **kwargs) -> list[float]:
    output = denoiser(x, *args, **kwargs)
    linear = getattr(denoiser, "_orig_mod", denoiser).linear
    return (output / linear(x)).mean(1).round().tolist()


X = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("t", "expected"), [(0, 1), (299.9, 1), (300, 10), (599, 10), (600, 100), (1000, 100)])
@pytest.mark.parametrize("form", ["number", "0-d", "[1]", "keyword"])
def test_selects_by_value_in_every_form(t: float, expected: float, form: str) -> None:
    value = {"number": t, "0-d": torch.tensor(t), "[1]": torch.tensor([t]), "keyword": torch.tensor(t)}[form]
    denoiser = routed()
    got = factor(denoiser, X, timestep=value) if form == "keyword" else factor(denoiser, X, value)
    assert got == [expected] * 4


def test_order_and_repetition_do_not_matter() -> None:
    denoiser = routed()
    steps = [900, 100, 400, 400, 100, 900, 350]
    forward = {t: denoiser(X, torch.tensor(t)) for t in steps}
    for t in reversed(steps):
        assert torch.equal(denoiser(X, torch.tensor(t)), forward[t])


def test_per_sample_timesteps_equal_single_calls() -> None:
    denoiser, steps = routed(), [900, 100, 400, 100]
    batch = denoiser(X, torch.tensor(steps))
    for i, t in enumerate(steps):
        torch.testing.assert_close(batch[i], denoiser(X[i : i + 1], torch.tensor(t))[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_uniform_batches_select_once_and_others_are_refused(compiled: bool) -> None:
    torch._dynamo.reset()
    denoiser = routed()
    denoiser.context.uniform = True
    run = torch.compile(denoiser, fullgraph=True) if compiled else denoiser
    with torch.no_grad():
        for t in (100, 900):
            assert factor(run, X, torch.tensor([t] * 4)) == [{100: 1.0, 900: 100.0}[t]] * 4
        with pytest.raises(RuntimeError, match="different timesteps"):
            run(X, torch.tensor([100, 900, 100, 100]))


def test_guidance_in_one_batch_equals_two_calls() -> None:
    denoiser, t = routed(), torch.tensor(450)
    both = denoiser(torch.cat([X, -X]), t)
    torch.testing.assert_close(both, torch.cat([denoiser(X, t), denoiser(-X, t)]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_routes_on_its_own(copied) -> None:
    denoiser = routed()
    duplicate = copied(denoiser)
    assert duplicate.context is context_of(duplicate) is not denoiser.context
    duplicate.table.mul_(2)
    assert factor(duplicate, X, torch.tensor(400)) == [20.0] * 4
    assert factor(denoiser, X, torch.tensor(400)) == [10.0] * 4


def test_two_denoisers_interleave() -> None:
    a, b = routed(), routed()
    with a.context.select(torch.tensor(100)):
        assert factor(b, X, torch.tensor(900)) == [100.0] * 4
        assert int(a.context.index("g")) == 0


@pytest.mark.parametrize("freezing", [False, True])
def test_compiles_to_one_graph_that_follows_the_timestep(freezing: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    denoiser = routed()
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        compiled = torch.compile(denoiser, fullgraph=True)
        got = [factor(compiled, X, torch.tensor(t))[0] for t in (900, 100, 400, 100)]
    assert got == [100, 1, 10, 1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_exports_with_the_lookup_in_the_graph() -> None:
    program = torch.export.export(routed(), (X, torch.tensor(100))).module()
    reference = routed()
    for t in (100, 400, 900):
        torch.testing.assert_close(program(X, torch.tensor(t)), reference(X, torch.tensor(t)))


@pytest.mark.parametrize("t", [-1.0, 1001.0, float("nan")])
def test_outside_the_calibrated_range_is_an_error(t: float) -> None:
    with pytest.raises(TimestepError, match="outside"):
        routed()(X, torch.tensor(t))


def test_outside_the_calibrated_range_uses_the_nearest_group_when_asked() -> None:
    assert factor(routed("nearest"), X, torch.tensor(5000)) == [100.0] * 4


def test_wrong_argument_name_lists_the_arguments() -> None:
    with pytest.raises(TimestepError, match="sample, timestep, scale"):
        attach_context(Denoiser(), TimestepContext({}), "sigma")


def test_missing_timestep_is_an_error() -> None:
    with pytest.raises(TimestepError, match="without its timestep"):
        routed()(X)


def test_detach_gives_the_class_back() -> None:
    denoiser = routed()
    detach_context(denoiser)
    assert type(denoiser) is Denoiser
    assert context_of(denoiser) is None
    assert set(vars(denoiser)) == set(vars(Denoiser()))


def test_nobody_sees_another_class() -> None:
    denoiser, kind = routed(), type(routed())
    assert isinstance(denoiser, Denoiser)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == ("Denoiser", "Denoiser", __name__)
    assert inspect.signature(denoiser.forward) == inspect.signature(Denoiser().forward)
    assert repr(denoiser) == repr(Denoiser())
    assert type(denoiser) is kind, "a class for every instance would compile every denoiser again"


def test_another_instance_of_the_class_is_not_routed() -> None:
    other = type(routed())()
    assert context_of(other) is None
    other.context = TimestepContext({"g": GROUPS})
    with other.context.select(400):
        assert factor(other, X, torch.tensor(900)) == [10.0] * 4


def test_a_class_that_keeps_a_list_of_its_subclasses_does_not_see_ours() -> None:
    kinds = []

    class Counting(Denoiser):
        def __init_subclass__(cls) -> None:
            kinds.append(cls)

    denoiser = Counting()
    attach_context(denoiser, TimestepContext({"g": GROUPS}), "timestep")
    assert context_of(denoiser) is not None
    assert kinds == []


def test_a_class_that_cannot_be_replaced_is_named() -> None:
    class Final(type):
        def __new__(cls, name, bases, body):
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("it is final")
            return super().__new__(cls, name, bases, body)

    class Sealed(Denoiser, metaclass=Final):
        pass

    with pytest.raises(TimestepError, match="Sealed cannot be routed.*final"):
        attach_context(Sealed(), TimestepContext({}), "timestep")


def test_a_copy_that_the_class_makes_itself_is_routed() -> None:
    class Rebuilt(Denoiser):
        def __reduce__(self):
            return Rebuilt, (), vars(self)

    denoiser = Rebuilt()
    denoiser.context = TimestepContext({"g": GROUPS})
    attach_context(denoiser, denoiser.context, "timestep")
    assert factor(copy.deepcopy(denoiser), X, torch.tensor(400)) == [10.0] * 4


class Layered(nn.Module):
    """A denoiser of two layers with tables, for wrappers and compilers."""

    def __init__(self) -> None:
        super().__init__()
        self.context = TimestepContext({"g": GROUPS})
        self.blocks = nn.ModuleList(Table(self.context) for _ in range(2))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            sample = block(sample)
        return sample


class Table(nn.Module):
    def __init__(self, context: TimestepContext) -> None:
        super().__init__()
        self.context = context
        self.register_buffer("table", torch.tensor([1.0, 10.0, 100.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * select_for_input(self.table, self.context.index("g"), x)


def layered() -> Layered:
    denoiser = Layered().eval()
    attach_context(denoiser, denoiser.context, "timestep")
    return denoiser


def scaled(denoiser: nn.Module, *timesteps: float) -> list[float]:
    x = torch.ones(len(timesteps), 3)
    return denoiser(x, torch.tensor(timesteps)).mean(1).tolist()


def hook(denoiser: nn.Module) -> None:
    """As offloading does: keeps the forward it finds, in an attribute, and comes back to it."""
    denoiser.found = denoiser.forward
    denoiser.forward = functools.partial(lambda module, *args: module.found(*args), denoiser)


def spy(denoiser: nn.Module) -> None:
    """As people do who want to see the calls: a closure that names no argument."""
    denoiser.found = found = denoiser.forward
    denoiser.forward = lambda *args, **kwargs: found(*args, **kwargs)


def unhook(denoiser: nn.Module) -> None:
    denoiser.forward = denoiser.found
    del denoiser.found


def mixed_precision(denoiser: nn.Module) -> None:
    """As training scripts do: wraps the function of the bound method, and notes what it wraps."""
    function = denoiser.forward.__func__

    @functools.wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*args, **kwargs)

    denoiser.forward = MethodType(forward, denoiser)


def unwrapped(denoiser: nn.Module) -> None:
    forward = denoiser.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    denoiser.forward = MethodType(forward, denoiser)


@pytest.mark.parametrize("wrap", [hook, spy, mixed_precision])
@pytest.mark.parametrize("first", ["wrapper", "routing"])
def test_wrappers_of_other_tools_come_and_go(wrap: Callable[[nn.Module], None], first: str) -> None:
    denoiser, take_off = Layered().eval(), {mixed_precision: unwrapped}.get(wrap, unhook)
    if first == "wrapper":
        wrap(denoiser)
    attach_context(denoiser, denoiser.context, "timestep")
    if first == "routing":
        wrap(denoiser)
    for change in (None, take_off, wrap):
        if change is not None:
            change(denoiser)
        assert scaled(denoiser, 100, 900) == [1, 1e4]
    take_off(denoiser)
    detach_context(denoiser)
    with pytest.raises(TimestepError, match="outside the denoiser's forward"):
        scaled(denoiser, 100)


def test_a_replica_runs_its_own_layers_with_its_own_timestep() -> None:
    denoiser = layered()
    replicas = [denoiser._replicate_for_data_parallel() for _ in range(2)]
    for factor, replica in enumerate(replicas, 1):
        blocks = replica.blocks._replicate_for_data_parallel()
        replica._modules["blocks"] = blocks
        for key, block in list(blocks._modules.items()):
            blocks._modules[key] = block._replicate_for_data_parallel()
            blocks._modules[key]._buffers["table"] = denoiser.blocks[0].table * factor
        assert replica.forward.__self__ is replica
    outputs = parallel_apply(replicas, [(torch.ones(1, 3), torch.tensor([t])) for t in (100, 900)])
    assert [float(y.mean()) for y in outputs] == [1, 4e4]
    assert scaled(denoiser, 400) == [100]


def parallel_apply(modules: list[nn.Module], inputs: list[tuple[Tensor, ...]]) -> list[Tensor]:
    with ThreadPoolExecutor(len(modules)) as pool:
        return list(pool.map(lambda module, args: module(*args), modules, inputs))


@pytest.mark.parametrize("form", ["eager", "compiled", "in place", "regions"])
def test_threads_share_a_denoiser(form: str) -> None:
    torch._dynamo.reset()
    denoiser = layered()
    if form == "in place":
        denoiser.compile(backend="eager", fullgraph=True)
    if form == "regions":
        for block in denoiser.blocks:
            block.compile(backend="eager", fullgraph=True)
    run = torch.compile(denoiser, backend="eager", fullgraph=True) if form == "compiled" else denoiser
    expected = {100: [1], 400: [100], 900: [1e4]}
    scaled(run, 100)  # compiled before the threads start

    def serve(t: int) -> list[list[float]]:
        return [scaled(run, t) for _ in range(20)]

    with ThreadPoolExecutor(3) as pool:
        for t, found in zip(expected, pool.map(serve, expected), strict=True):
            assert found == [expected[t]] * 20


def test_batches_of_any_size_are_one_graph() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    denoiser = layered()
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True, dynamic=True)
    for timesteps in ((100, 900), (400, 900, 100), (900, 900, 900, 900), (400, 100)):
        assert scaled(compiled, *timesteps) == scaled(denoiser, *timesteps)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("strict", [False, True])
def test_exported_samples_select_their_own(strict: bool) -> None:
    example = (torch.ones(2, 3), torch.tensor([100.0, 400.0]))
    program = torch.export.export(layered(), example, strict=strict).module()
    assert scaled(program, 900.0, 100.0) == [1e4, 1]


@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_tokens_select_their_own(form: str) -> None:
    torch._dynamo.reset()
    denoiser = layered()
    run = torch.compile(denoiser, backend="eager", fullgraph=True) if form == "compiled" else denoiser
    y = run(torch.ones(2, 3, 5), torch.tensor([[0, 400, 900], [0, 0, 0]]))
    assert y.mean(2).tolist() == [[1, 100, 1e4], [1, 1, 1]]
    text = run(torch.ones(2, 4, 5), torch.tensor([[0, 400, 900], [0, 0, 0]]))
    assert text.mean(2).tolist() == [[1e4] * 4, [1] * 4]


def test_a_compiled_region_is_computed_again_with_its_own_group() -> None:
    torch._dynamo.reset()

    def gradient(compiled: bool) -> list[Tensor]:
        denoiser, found = layered(), []
        if compiled:
            for block in denoiser.blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        xs = [torch.ones(1, 3, requires_grad=True) for _ in range(2)]
        with torch.no_grad():
            denoiser(xs[0], torch.tensor([400]))
        outputs = []
        for x, t in zip(xs, (100, 900), strict=True):
            with denoiser.context.select(t):
                h = x
                for block in denoiser.blocks:
                    h = checkpoint(block, torch.sin(h), use_reentrant=False)
                outputs.append(h)
        for y in outputs:
            y.sum().backward()
        found.extend(x.grad for x in xs)
        return found

    for plain, compiled in zip(gradient(False), gradient(True), strict=True):
        torch.testing.assert_close(plain, compiled)
