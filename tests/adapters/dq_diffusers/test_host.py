from __future__ import annotations

import logging

from dq_diffusers.host import diffusers_attribute


def test_classes_are_found_and_missing_ones_are_none():
    assert diffusers_attribute("UNet2DModel").__name__ == "UNet2DModel"
    assert diffusers_attribute("NoSuchModel") is None


def test_other_libraries_may_speak_again_afterwards():
    logger = logging.getLogger("torchao")
    before = logger.level
    diffusers_attribute("DiTTransformer2DModel")
    assert logger.level == before
