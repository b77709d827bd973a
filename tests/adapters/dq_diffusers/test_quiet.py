from __future__ import annotations

import pytest
from diffusers.utils import logging as of_diffusers
from dq_diffusers.quiet import loading_bars
from transformers.utils import logging as of_transformers


@pytest.mark.parametrize("library", [of_diffusers, of_transformers])
def test_bars_come_back_as_they_were(library) -> None:
    library.enable_progress_bar()
    with loading_bars(shown=True):
        assert library.is_progress_bar_enabled()
    with loading_bars(shown=False):
        assert not library.is_progress_bar_enabled()
    assert library.is_progress_bar_enabled()
    library.disable_progress_bar()
    with loading_bars(shown=False):
        pass
    assert not library.is_progress_bar_enabled()
    library.enable_progress_bar()
