from __future__ import annotations

import statistics

import joblib
import numpy as np
import pytest
from toy_spaces import ToyFitness, toy_space

from dq_plugins.errors import DQError
from dq_plugins.passes.steps.evolution import STATE, Evolution, EvolutionOptions
from dq_plugins.passes.steps.space import Candidate
from dq_plugins.progress import finish

QUICK = EvolutionOptions(population=16, parents=5, mutants=8, crossovers=3, generations=12)


def options(**changes):
    return EvolutionOptions(**{**vars(QUICK), **changes})


@pytest.fixture(scope="module")
def searches():
    found = []
    for seed in range(10):
        space = toy_space(seed, layers=3)
        fitness = ToyFitness(space, seed)
        state = finish(Evolution(space, fitness, options(), seed=seed).run())
        found.append((fitness, state))
    return found


def test_the_optimum_is_found_on_nine_of_ten_seeds(searches):
    hits = [state.best.candidate == fitness.optimum()[0] for fitness, state in searches]
    assert sum(hits) >= 9


def test_it_beats_random_search_of_as_many_evaluations_in_the_median(searches):
    ratios = []
    for seed, (fitness, state) in enumerate(searches):
        # the same cost, and scores on the last rung from the start, which the search does not have
        rng, last = np.random.default_rng(seed), fitness.rungs - 1
        drawn = [fitness.space.random(rng) for _ in range(state.evaluations[-1])]
        ratios.append(min(fitness(candidate, last)["loss"] for candidate in drawn) / state.best.loss)
    assert statistics.median(ratios) > 1.0


def test_no_candidate_is_scored_twice_or_over_budget(searches):
    for fitness, state in searches:
        in_search = fitness.scored[: sum(state.evaluations)]
        assert len(set(in_search)) == len(in_search)
        assert all(fitness.space.fits(Candidate.parse(k.partition(":")[2])) for k in in_search)


def test_bad_candidates_die_on_the_first_rung(searches):
    for _, state in searches:
        assert state.evaluations[1] <= state.evaluations[0] / 2 + len(state.history)


def test_the_best_never_gets_worse(searches):
    for _, state in searches:
        assert state.history == sorted(state.history, reverse=True)


def test_paper_settings_are_the_defaults():
    o = EvolutionOptions()
    assert (o.population, o.parents, o.mutants, o.crossovers, o.generations, o.mutation) == (50, 10, 25, 10, 20, 0.25)


def test_seeds_over_budget_are_not_scored():
    space = toy_space(0, layers=3)
    fitness = ToyFitness(space, 0)
    over = Candidate((0, 0, 0), tuple(m - 1 for m in space.choice_counts))
    assert not space.fits(over)
    finish(Evolution(space, fitness, options(generations=1), seeds=(over,)).run())
    assert not any(key.endswith(over.key) for key in fitness.scored)


class Interrupted(Exception):  # noqa: N818
    pass


class Stopping(ToyFitness):
    """Stops after so many scores, as a killed process does."""

    left = 10**9

    def __call__(self, candidate, rung):
        if self.left == 0:
            raise Interrupted
        self.left -= 1
        return super().__call__(candidate, rung)


def test_interrupted_anywhere_and_resumed_it_ends_the_same(tmp_path):
    space = toy_space(1, layers=3)
    short = options(generations=2, population=10)
    whole = finish(Evolution(space, ToyFitness(space, 1), short, folder=tmp_path / "whole").run())
    total = sum(whole.evaluations)
    for stop in range(0, total, 11):
        folder = tmp_path / f"stopped-{stop}"
        fitness = Stopping(space, 1)
        fitness.left = stop
        with pytest.raises(Interrupted):
            finish(Evolution(space, fitness, short, folder=folder).run())
        again = ToyFitness(space, 1)
        resumed = finish(Evolution(space, again, short, folder=folder).run())
        assert resumed == whole
        # and nothing that was scored before is scored again
        assert len(again.scored) == total - stop


def test_a_search_with_other_settings_does_not_resume(tmp_path):
    space = toy_space(1, layers=3)
    finish(Evolution(space, ToyFitness(space, 1), options(generations=1), folder=tmp_path).run())
    other = finish(Evolution(space, ToyFitness(space, 1), options(generations=2), folder=tmp_path).run())
    fresh = finish(Evolution(space, ToyFitness(space, 1), options(generations=2)).run())
    assert other == fresh


def test_a_damaged_checkpoint_says_so(tmp_path):
    (tmp_path / "state.json").write_text("{")
    space = toy_space(1, layers=3)
    with pytest.raises(DQError, match=r"state\.json cannot be read as JSON"):
        finish(Evolution(space, ToyFitness(space, 1), QUICK, folder=tmp_path).run())


def test_workers_find_the_same(tmp_path):
    space = toy_space(2, layers=3)
    short = options(generations=0, population=4)
    alone = finish(Evolution(space, ToyFitness(space, 2), short, folder=tmp_path / "one").run())
    with joblib.parallel_config("threading"):  # any backend: local processes, Dask, Ray
        both = options(generations=0, population=4, workers=2)
        spread = finish(Evolution(space, ToyFitness(space, 2), both, folder=tmp_path / "two").run())
    assert spread == alone


def test_state_survives_the_file_bit_for_bit(tmp_path):
    space = toy_space(3, layers=3)
    state = finish(Evolution(space, ToyFitness(space, 3), options(generations=1)).run())
    assert STATE.read(STATE.write(tmp_path / "state.json", state)) == state


def test_progress_goes_to_its_total():
    space = toy_space(0, layers=2)
    steps = list(Evolution(space, ToyFitness(space, 0), options(generations=2)).run())
    done = [s.done for s in steps]
    assert done == sorted(done)
    assert done[-1] == steps[-1].total
