from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, cast

import torch

from dq_plugins.recipe import PassContext

UNUSED = cast(Any, None)


def draws(seed: int = 0, running: str = "first", *names: str) -> list[int]:
    generator = PassContext(UNUSED, UNUSED, seed=seed, running=running).generator(*names)
    return torch.randint(2**31, (8,), generator=generator).tolist()


def test_streams_differ_by_seed_pass_and_names():
    streams = [draws(), draws(1), draws(0, "second"), draws(0, "first", "a"), draws(0, "first", "b")]
    streams += [draws(0, "first", "a", "b"), draws(0, "first", "ab"), draws(0, "firsta")]
    assert len({tuple(stream) for stream in streams}) == len(streams)
    assert draws(0, "first", "a") == draws(0, "first", "a")


def test_streams_do_not_depend_on_the_hash_seed_of_the_interpreter():
    code = "from dq_plugins.recipe import PassContext; print(PassContext(None, None, running='a').stream('b'))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{PassContext(UNUSED, UNUSED, running='a').stream('b')}\n".encode()}
