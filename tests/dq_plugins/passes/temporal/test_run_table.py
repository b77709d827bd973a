import pytest
import torch
from denoisers import SCHEDULE, example, sinusoid, tiny_denoiser
from torch import Tensor, nn

from dq_plugins.errors import TimestepError
from dq_plugins.passes.temporal.run_table import RunTable


class ClassConditional(nn.Module):
    """A modulated transformer in miniature: t and the class meet before the modulation."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.label = nn.Linear(16, 12), nn.Embedding(5, 12)
        self.enter, self.leave = nn.Linear(3, 12), nn.Linear(12, 3)
        self.modulate = nn.ModuleList(nn.Linear(12, 24) for _ in range(2))
        self.mix = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.calls = 0

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        e = nn.functional.silu(self.time(sinusoid(timestep, 16)) + self.label(label))
        x = self.enter(sample)
        for modulate, mix in zip(self.modulate, self.mix, strict=True):
            scale, shift = modulate(e)[:, None].chunk(2, dim=-1)
            x = x + mix(x * (1 + scale) + shift)
        return self.leave(x)


@pytest.fixture
def denoiser() -> ClassConditional:
    torch.manual_seed(0)
    return ClassConditional().eval().requires_grad_(False)


def call(t: float, labels: tuple[int, ...] = (1, 3)) -> dict[str, Tensor]:
    x = torch.randn(len(labels), 4, 3, generator=torch.Generator().manual_seed(int(t)))
    return {"sample": x, "timestep": torch.full((len(labels),), t), "label": torch.tensor(labels)}


def test_every_step_equals_the_live_denoiser(denoiser) -> None:
    table = RunTable(denoiser, call(1.0))
    assert set(table.nodes.values()) == {"modulate.0", "modulate.1"}
    assert set(table.skipped) == {"time"}
    live = {t: denoiser(**call(t)) for t in SCHEDULE}
    with table.installed(SCHEDULE, call(1.0)):
        for t in reversed(SCHEDULE):
            torch.testing.assert_close(denoiser(**call(t)), live[t])


def test_the_block_does_not_run_during_the_steps(denoiser) -> None:
    ran = []
    for name in ("time", "modulate.0"):
        denoiser.get_submodule(name).register_forward_hook(lambda *_, n=name: ran.append(n))
    table = RunTable(denoiser, call(1.0))
    with table.installed(SCHEDULE, call(1.0)):
        denoiser(**call(SCHEDULE[0]))
    assert ran == []
    denoiser(**call(SCHEDULE[0]))
    assert ran == ["time", "modulate.0"]


def test_another_class_needs_another_table(denoiser) -> None:
    table = RunTable(denoiser, call(1.0))
    a = table.compute(SCHEDULE, call(1.0, (1, 3)))
    b = table.compute(SCHEDULE, call(1.0, (0, 3)))
    assert not torch.allclose(a["modulate.0"][:, 0], b["modulate.0"][:, 0])
    torch.testing.assert_close(a["modulate.0"][:, 1], b["modulate.0"][:, 1])


@pytest.mark.parametrize("wrong", [call(500.0), call(SCHEDULE[0], (1, 2, 3))], ids=["timestep", "batch"])
def test_what_the_table_does_not_hold_is_an_error(denoiser, wrong) -> None:
    table = RunTable(denoiser, call(1.0))
    with table.installed(SCHEDULE, call(1.0)), pytest.raises(TimestepError, match="run table holds 5 timesteps"):
        denoiser(**wrong)


def test_modules_and_forward_are_restored(denoiser) -> None:
    before = dict(denoiser.named_modules())
    with RunTable(denoiser, call(1.0)).installed(SCHEDULE, call(1.0)):
        pass
    assert dict(denoiser.named_modules()) == before
    assert "forward" not in denoiser.__dict__


def test_works_where_t_is_alone() -> None:
    denoiser = tiny_denoiser()
    inputs = {"sample": torch.randn(2, 2, 8, 8), "timestep": torch.tensor([SCHEDULE[1]] * 2)}
    live = denoiser(**inputs)
    with RunTable(denoiser, inputs).installed(SCHEDULE, inputs):
        torch.testing.assert_close(denoiser(**inputs), live)


def test_stand_ins_keep_the_sizes_of_their_layers() -> None:
    model = tiny_denoiser()
    inputs = example()
    with RunTable(model, inputs).installed(SCHEDULE, inputs):
        assert (model.p.in_features, model.body[0].beta.out_features) == (16, 8)
