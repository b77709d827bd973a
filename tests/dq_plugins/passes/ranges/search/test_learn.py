import pytest
import torch
from planted_groups import finished, planted, points_loss, search

from dq_plugins.artifact import UnitResults
from dq_plugins.errors import RecipeError
from dq_plugins.passes.ranges.search.decide import decided, renumbered
from dq_plugins.passes.ranges.search.learn import STATE, UNIT, learn_groups
from dq_plugins.passes.ranges.search.relaxation import Relaxation


def test_planted_regimes_are_recovered_from_scratch_and_the_mixture_becomes_its_argmax() -> None:
    recovered = 0
    for seed in range(10):
        values, regime = planted(seed)
        learned = search(values, seed, 3)
        recovered += torch.equal(decided(learned.weights[0], contiguous=True), regime)
        assert learned.entropy < 0.01
        assert learned.hard_loss == pytest.approx(learned.mixture_loss, rel=1e-3)
    assert recovered >= 9


def test_regimes_that_are_no_runs_are_recovered_too() -> None:
    values, regime = planted(1, shuffled=True)
    learned = search(values, 1, 3)
    assert torch.equal(decided(learned.weights[0], contiguous=False), renumbered(regime))


def test_without_the_entropy_term_the_mixture_stays_a_mixture() -> None:
    for seed in range(2):
        learned = search(planted(seed)[0], seed, 3, entropy_weight=0.0)
        assert learned.entropy > 0.2
        assert learned.top_weight < 0.95
        assert learned.hard_loss > 1.005 * learned.mixture_loss


def test_an_entropy_weight_that_overrules_the_loss_from_the_start_loses_regimes() -> None:
    values, regime = planted(0)
    learned = search(values, 0, 3, entropy_weight=100.0, warmup=0.0)
    assert not torch.equal(decided(learned.weights[0], contiguous=True), regime)


def test_the_same_seed_gives_the_same_groups_bit_for_bit() -> None:
    one, other = (search(planted(0)[0], 5, 4, rounds=20) for _ in range(2))
    assert torch.equal(one.weights, other.weights)
    assert one.mixture_loss == other.mixture_loss


def start_of(values):
    low, high = values.amin(-1)[:, :3], values.amax(-1)[:, :3]
    return Relaxation(torch.randn(1, 24, 3, generator=torch.Generator().manual_seed(0)), low, high)


def test_what_the_loss_is_divided_by_is_the_scale_alone() -> None:
    values = planted(0)[0]
    whole, halved = points_loss(values), points_loss(values)
    halved.loss = lambda *given: whole.loss(*given) / 2
    one = finished(learn_groups(start_of(values), whole, 10, scale=2.0))
    other = finished(learn_groups(start_of(values), halved, 10))
    assert torch.equal(one.weights, other.weights)
    assert not torch.equal(one.weights, finished(learn_groups(start_of(values), whole, 10)).weights)


def test_an_interrupted_search_goes_on_where_it_was_and_ends_the_same(tmp_path) -> None:
    values, rounds, kept = planted(0)[0], 60, UnitResults(STATE, tmp_path, {"of": "a"})
    whole = finished(learn_groups(start_of(values), points_loss(values), rounds))
    interrupted = learn_groups(start_of(values), points_loss(values), rounds, kept=kept)
    for _ in range(53):
        next(interrupted)
    interrupted.close()
    resumed = learn_groups(start_of(values), points_loss(values), rounds, kept=kept)
    assert next(resumed) == 51
    again = finished(resumed)
    assert torch.equal(again.weights, whole.weights)
    assert again.mixture_loss == whole.mixture_loss


@pytest.mark.parametrize("damage", ["another signature", "cut off"])
def test_a_state_that_is_not_this_searchs_is_not_used(tmp_path, damage: str) -> None:
    values, rounds, kept = planted(0)[0], 26, UnitResults(STATE, tmp_path, {"of": "a"})
    finished(learn_groups(start_of(values), points_loss(values), rounds, kept=kept))
    if damage == "cut off":
        kept.path(UNIT).write_bytes(kept.path(UNIT).read_bytes()[:100])
    else:
        kept = UnitResults(STATE, tmp_path, {"of": "b"})
    assert next(learn_groups(start_of(values), points_loss(values), rounds, kept=kept)) == 1


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    values = planted(0)[0]
    loss = points_loss(values)
    loss.share = loss.share * torch.nan
    with pytest.raises(RecipeError, match="is nan at iteration 0"):
        finished(learn_groups(start_of(values), loss, 10))
