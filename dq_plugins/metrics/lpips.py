"""Learned perceptual image patch similarity, through torchmetrics and the AlexNet that torchvision downloads."""

from __future__ import annotations

from torch import Tensor

from dq_plugins.errors import DQError
from dq_plugins.metrics.image import value_range_of
from dq_plugins.metrics.metric import metric


@metric(higher_is_better=False)
def lpips(reference: Tensor, output: Tensor, *, value_range: float | None = None) -> float:
    """LPIPS (Zhang et al. 2018) over AlexNet: mean over the images. Computed in float32.

    Args:
        reference: ``[B, 3, H, W]``, or ``[B, 1, H, W]`` for grey images; 32 pixels a side at least.
        output: the same shape.
        value_range: range of the values, 2 for images in [-1, 1]; by default the range of the reference's values,
            which then start at the reference's least.

    Raises:
        DQError: other shapes, or the network's weights are not there and cannot be downloaded.
    """
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    if reference.dim() != 4 or reference.shape[1] not in (1, 3) or min(reference.shape[2:]) < 32:
        raise DQError(
            f"metric 'lpips' compares images [B, 3, H, W] of 32 pixels a side or more; got {tuple(reference.shape)}"
        )
    peak, low = value_range_of(reference, value_range), float(reference.min())
    # to [-1, 1], three channels
    x, y = (((image.float() - low) / peak * 2 - 1).clamp(-1, 1).expand(-1, 3, -1, -1) for image in (reference, output))
    try:
        return float(learned_perceptual_image_patch_similarity(x, y, net_type="alex"))
    except (ImportError, OSError) as error:  # no torchvision; no network and no copy of the weights
        raise DQError(
            f"metric 'lpips' needs the weights of torchvision's AlexNet, and they are not here: {error}. Put them into "
            "torch.hub.get_dir()/checkpoints, or judge by another metric (`dq-plugins list --kind metric`)"
        ) from error
