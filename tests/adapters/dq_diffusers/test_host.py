from __future__ import annotations

import logging

import pytest
from diffusers.utils import logging as of_diffusers
from dq_diffusers.host import diffusers_attribute, loading_bars
from transformers.utils import logging as of_transformers


def test_classes_are_found_and_missing_ones_are_none():
    assert diffusers_attribute("UNet2DModel").__name__ == "UNet2DModel"
    assert diffusers_attribute("NoSuchModel") is None


def test_other_libraries_may_speak_again_afterwards():
    logger = logging.getLogger("torchao")
    before = logger.level
    diffusers_attribute("DiTTransformer2DModel")
    assert logger.level == before


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
