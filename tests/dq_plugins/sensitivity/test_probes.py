from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from sensitivities import tiny_setting
from torch import nn

import dq_plugins as dq
from dq_plugins.progress import finish
from dq_plugins.quantized.candidates import Candidates, Entry
from dq_plugins.sensitivity.exact_noise import ExactContent, ExactQuality
from dq_plugins.sensitivity.measure import measure
from dq_plugins.sensitivity.probes import ContentProbes, QualityProbes
from dq_plugins.sensitivity.sensitivity_table import cost, relative
from dq_plugins.sensitivity.trajectory import trajectories_of


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory):
    return tiny_setting(tmp_path_factory.mktemp("setting"), batch=4)


def logs(values: dict) -> list[float]:
    return [torch.tensor(v).log().item() for v in values.values()]


def test_noise_of_a_linear_denoiser_is_estimated_without_bias():
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, sample, timestep):
            return self.b(self.a(sample))

    torch.manual_seed(0)
    denoiser = Linear().eval().requires_grad_(False)
    from dq_plugins.plan import WeightQuant
    from dq_plugins.quantized.weight_scale import weight_parameters
    from dq_plugins.sensitivity.jacobian import JacobianProbe, signs

    weights = {n: {3: WeightQuant(3, weight_parameters(getattr(denoiser, n).weight, 3)[0])} for n in ("a", "b")}
    candidates = Candidates(weights, {})
    x = torch.randn(5, 6)
    entry = Entry("a", "weight", 3)
    moved = weights["a"][3].fake_quantize(denoiser.a.weight) - denoiser.a.weight
    exact = float((x @ moved.T @ denoiser.b.weight.T).double().square().sum())
    with JacobianProbe(denoiser, candidates).open() as probe:
        output = probe.run({"sample": x, "timestep": torch.tensor(1.0)})
        cotangents = signs((2000, *output.shape), torch.Generator().manual_seed(0))
        moved, _ = probe.backward(output, cotangents, torch.tensor(1.0))
    assert moved[entry].shape == (2000, 5)
    assert float(moved[entry].sum(1).square().mean()) == pytest.approx(exact, rel=0.1)
    assert float(moved[entry].square().sum(1).mean()) == pytest.approx(exact, rel=0.1)


def test_probes_rank_entries_like_exact_measurement_at_a_fraction_of_the_calls(setting):
    denoiser, calibration, candidates = setting
    fast = finish(measure(QualityProbes(denoiser, candidates, calibration, probes=8)))
    slow = finish(measure(ExactQuality(denoiser, candidates, calibration)))
    estimate, exact = relative(fast, candidates), relative(slow, candidates)
    assert spearmanr(list(estimate.values()), list(exact.values())).statistic > 0.97
    ratio = [a - b for a, b in zip(logs(estimate), logs(exact), strict=True)]
    assert abs(sum(ratio) / len(ratio)) < 0.4
    assert cost(fast) == 5 * (1 + 4 + 2 * 8)  # a call, its layers at four widths, eight backward passes
    assert cost(slow) == 5 * len(candidates.entries())


def test_tape_leaves_the_denoiser_as_it_was(setting):
    denoiser, calibration, candidates = setting
    QualityProbes(denoiser, candidates, calibration, probes=1)("0")
    assert not any(p.requires_grad for p in denoiser.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in denoiser.modules())
    call = next(calibration.calls())
    assert torch.equal(call.run(denoiser), call.output)


def test_same_seed_same_estimate_and_another_seed_another(setting):
    denoiser, calibration, candidates = setting
    one, same, other = (QualityProbes(denoiser, candidates, calibration, 1, seed)("0") for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_content_probes_rank_entries_like_the_final_images(setting):
    denoiser, calibration, candidates = setting
    argument = dq.partition(denoiser, calibration.example_inputs()).sample_argument
    runs = trajectories_of(calibration, argument)
    fast = finish(measure(ContentProbes(denoiser, candidates, runs, probes=6)))
    slow = finish(measure(ExactContent(denoiser, candidates, runs)))
    structure, texture = (relative(fast, candidates, f"#{part}") for part in ("structure", "texture"))
    exact = relative(slow, candidates)
    assert spearmanr([structure[e] + texture[e] for e in exact], list(exact.values())).statistic > 0.95


def test_layers_that_share_an_input_are_told_apart(tmp_path):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, sample, timestep):
            return 100 * self.one(sample) + self.two(sample)

    torch.manual_seed(0)
    denoiser = Shared().eval().requires_grad_(False)

    def sample(d):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        for t in (3.0, 2.0):
            x = x + 0.01 * d(sample=x, timestep=torch.tensor(t))

    calibration = dq.record(denoiser, sample, out=tmp_path, progress=False)
    from sensitivities import candidates_of

    candidates = candidates_of(denoiser, calibration, (4,))
    found = relative(finish(measure(QualityProbes(denoiser, candidates, calibration, 32))), candidates)
    exact = relative(finish(measure(ExactQuality(denoiser, candidates, calibration))), candidates)
    for name in ("one", "two"):
        entry = Entry(name, "activation", 4)
        assert found[entry] == pytest.approx(exact[entry], rel=0.5)
    assert found[Entry("one", "activation", 4)] > 100 * found[Entry("two", "activation", 4)]


def test_worker_processes_measure_what_one_process_does(setting):
    denoiser, calibration, candidates = setting
    few = candidates.entries()[:6]
    alone = finish(measure(ExactQuality(denoiser, candidates.subset(few), calibration)))
    assert finish(measure(ExactQuality(denoiser, candidates.subset(few), calibration), workers=2)) == alone
    probes = QualityProbes(denoiser, candidates, calibration, probes=1)
    probes("0")
    spread = relative(finish(measure(probes, workers=2)), candidates)
    assert spread == pytest.approx(relative(finish(measure(probes)), candidates))
