import torch

from dq_plugins.passes.ranges.search.active import expected_gain, next_timestep


def rounds(entropy: torch.Tensor, eta: float, count: int) -> torch.Tensor:
    visits = torch.zeros(len(entropy), dtype=torch.int64)
    for _ in range(count):
        index = next_timestep(expected_gain(entropy, visits, eta), torch.full_like(visits, 100) - visits)
        visits[index] += 1
    return visits


def test_a_large_eta_visits_all_timesteps_alike() -> None:
    visits = rounds(torch.rand(7, generator=torch.Generator().manual_seed(0)), 1e6, 40)
    assert int(visits.max() - visits.min()) <= 1


def test_without_eta_the_least_decided_timestep_is_always_drawn() -> None:
    assert rounds(torch.tensor([0.3, 0.9, 0.5]), 0.0, 12).tolist() == [0, 12, 0]


def test_the_papers_eta_lies_between() -> None:
    visits = rounds(torch.tensor([0.0, 0.6, 1.2]), 1.5, 12)
    assert visits[2] > visits[1] > visits[0] >= 1


def test_timesteps_without_images_left_are_passed_over() -> None:
    gain = torch.tensor([3.0, 2.0, 1.0])
    assert next_timestep(gain, torch.tensor([0, 1, 1])) == 1
    assert next_timestep(gain, torch.zeros(3)) is None
