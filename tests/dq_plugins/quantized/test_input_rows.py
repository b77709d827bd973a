from __future__ import annotations

import pytest
import torch
from torch import nn

from dq_plugins.quantized.input_rows import has_rows, input_rows, seen_and_held_out, weight_matrix

LAYERS = [
    (nn.Linear(6, 4), (2, 5, 6)),
    (nn.Linear(6, 4), (6,)),
    (nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 5)),
    (nn.Conv2d(4, 6, (3, 1), padding="same", dilation=2), (2, 4, 7, 5)),
    (nn.Conv2d(4, 6, 3, groups=2, stride=(2, 1), dilation=(1, 2)), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 5)),
    (nn.Conv2d(4, 6, 1), (4, 7, 5)),
    (nn.Conv3d(2, 3, 3, padding=1), (1, 2, 4, 5, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v))
def test_rows_times_the_weight_matrix_are_outputs_of_the_layer(layer, shape):
    assert has_rows(layer)
    x = torch.randn(shape)
    rows = input_rows(layer, x, 10**6, torch.Generator())
    y = rows @ weight_matrix(layer, layer.weight).transpose(1, 2)  # [P, R, O/P]
    y = y.transpose(0, 1).flatten(1)  # [R, O]
    expected = layer(x)
    channels = -1 if isinstance(layer, nn.Linear) else expected.dim() - 1 - len(layer.kernel_size)
    assert torch.allclose(y, expected.movedim(channels, -1).reshape(y.shape) - layer.bias, atol=1e-5)


def test_a_sample_of_rows_is_drawn_from_all_of_them_without_repetition():
    layer, x = nn.Linear(1, 1), torch.arange(100.0)[:, None]
    rows = input_rows(layer, x, 20, torch.Generator().manual_seed(0))[0, :, 0]
    assert len(rows.unique()) == 20
    assert rows.max() > 50
    again = input_rows(layer, x, 20, torch.Generator().manual_seed(0))[0, :, 0]
    assert torch.equal(rows, again)
    assert not torch.equal(rows, input_rows(layer, x, 20, torch.Generator().manual_seed(1))[0, :, 0])


def test_transposed_convolutions_have_no_rows():
    assert not has_rows(nn.ConvTranspose2d(2, 2, 2))
    assert not has_rows(nn.Embedding(3, 2))


def test_both_rows_of_a_guided_image_are_seen_or_held_out():
    images = torch.arange(4.0)[:, None]
    seen, held_out = seen_and_held_out(torch.cat([images, images]), batched=True)
    assert not set(seen.flatten().tolist()) & set(held_out.flatten().tolist())
    assert len(seen) == len(held_out) == 4
    for alone, batched in ((images[:1], True), (images, False)):
        assert all(torch.equal(part, alone) for part in seen_and_held_out(alone, batched=batched))
