import base64
import io

import numpy as np
import pytest
from PIL import Image

from dq_plugins.report.pictures import Picture, differences


def test_a_picture_is_kept_pixel_by_pixel():
    image = np.arange(256).reshape(16, 16) / 255
    kind, data = Picture(image, "ramp").uri.split(",")
    assert kind == "data:image/png;base64"
    read = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert (read == np.arange(256).reshape(16, 16)).all()


@pytest.mark.parametrize(("size", "gain"), [(0.4, 2), (0.02, 32), (0.9, 1), (0.0, 1)])
def test_differences_are_as_strong_as_can_be_without_clipping(size, gain):
    reference = [np.full((4, 4), 0.5)]
    maps, found = differences(reference, [reference[0] + size])
    assert found == gain
    assert np.allclose(maps[0], gain * size)
