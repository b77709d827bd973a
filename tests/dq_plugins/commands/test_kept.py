from __future__ import annotations

import argparse

import pytest

import dq_plugins as dq
from dq_plugins.commands.kept import last_words
from dq_plugins.recipe import Pass, Recipe, Step
from dq_plugins.registry import temporary
from dq_plugins.testing.denoiser import TinyDenoiser, sample


class Interrupted(Pass):
    """Ends like Ctrl-C."""

    name = "interrupted"

    def run(self, plan, context) -> None:
        raise KeyboardInterrupt


def test_the_last_words_say_what_is_kept_and_how_to_go_on(tmp_path) -> None:
    args = argparse.Namespace(command="quantize", out=str(tmp_path))
    assert last_words(args) == "nothing was finished yet; run the same command again"
    calibration = dq.record(denoiser := TinyDenoiser(), sample, tmp_path / "calib", progress=False)
    recipe = Recipe("r", "", (Step("weight-ranges"), Step("interrupted")))
    with temporary("pass", "interrupted", Interrupted), pytest.raises(KeyboardInterrupt):
        dq.make_plan(denoiser, calibration, recipe, out=tmp_path / "plan", progress=False)
    assert last_words(args) == (
        f"kept: 10 recorded calls in {tmp_path / 'calib'}; 1 of 2 passes, and the finished parts of the next, in "
        f"{tmp_path / 'plan' / 'work'}. The same command goes on from there"
    )
    assert "nothing is kept" in last_words(argparse.Namespace(command="evaluate"))
