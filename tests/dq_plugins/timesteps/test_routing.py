import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

from dq_plugins.errors import TimestepError
from dq_plugins.timesteps import TimestepContext, TimestepGroups, attach_context, context_of, detach_context

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
