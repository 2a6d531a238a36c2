"""Draw feature maps as images."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.visualization.utils import convert_overlay_heatmap, img_from_canvas, resize_image
from stratagem.utils import import_module

__all__ = ["draw_feature_map"]

_Image = npt.NDArray[np.uint8]
_REDUCTIONS = ("squeeze_mean", "select_max")


def draw_feature_map(
    featmap: torch.Tensor,
    overlaid_image: _Image | None,
    channel_reduction: str | None,
    topk: int,
    arrangement: tuple[int, int],
    resize_shape: tuple[int, int] | None,
    alpha: float,
) -> _Image:
    """Return a feature map as an RGB image; see ``Visualizer.draw_featmap``."""
    require(isinstance(featmap, torch.Tensor), f"`featmap` should be torch.Tensor, but got {type(featmap).__name__}.")
    require(featmap.ndim == 3, f"featmap must have three dimensions (C, H, W), but got {tuple(featmap.shape)}.")
    features, image = _same_size(featmap.detach().cpu(), overlaid_image, resize_shape)
    if channel_reduction is not None:
        require(
            channel_reduction in _REDUCTIONS,
            f'channel_reduction must be "squeeze_mean", "select_max" or None, but got {channel_reduction!r}.',
        )
        is_mean = channel_reduction == "squeeze_mean"
        return convert_overlay_heatmap(features.mean(0) if is_mean else features[_largest(features, 1)], image, alpha)
    if topk <= 0:
        require(
            features.shape[0] in (1, 3),
            f"With topk={topk}, the feature map must have one or three channels, but it has {features.shape[0]}. Set topk to a "
            "positive number, or set channel_reduction.",
        )
        return convert_overlay_heatmap(features, image, alpha)
    rows, columns = arrangement
    require(
        rows * columns >= topk, f"An arrangement of {rows} x {columns} has not enough room for topk={topk} channels."
    )
    return _draw_grid(features, _largest(features, topk), image, rows, columns, alpha)


def _same_size(
    features: torch.Tensor, image: _Image | None, shape: tuple[int, int] | None
) -> tuple[torch.Tensor, _Image | None]:
    """Return the feature map and an RGB image with the same height and width."""
    if image is not None and image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, 2)
    if image is not None and image.shape[:2] != features.shape[1:]:
        warnings.warn(
            f"The image has the size {image.shape[:2]}, and the feature map {tuple(features.shape[1:])}: the feature map is "
            "interpolated.",
            stacklevel=4,
        )
        shape = shape or (image.shape[0], image.shape[1])
    if shape is None:
        return features, image
    features = functional.interpolate(features[None], tuple(shape), mode="bilinear", align_corners=False)[0]
    return features, None if image is None else resize_image(image, shape)


def _largest(features: torch.Tensor, count: int) -> torch.Tensor:
    """Return the numbers of the channels with the largest sums, largest first."""
    return torch.topk(features.sum(dim=(1, 2)), min(len(features), count)).indices


def _draw_grid(
    features: torch.Tensor, channels: torch.Tensor, image: _Image | None, rows: int, columns: int, alpha: float
) -> _Image:
    """Return channels next to each other, each with its number."""
    figure: Any = import_module("matplotlib.figure", extra="plot").Figure(frameon=False)
    canvas = import_module("matplotlib.backends.backend_agg", extra="plot").FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0, hspace=0)
    height, width = features.shape[1:]
    # A hundredth of a pixel, so that rounding does not lose one.
    figure.set_size_inches(*((size + 1e-2) / figure.get_dpi() for size in (width * columns, height * rows)))
    for place, channel in enumerate(channels.tolist(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.axis("off")
        axes.text(2, 15, f"channel: {channel}", fontsize=10)
        axes.imshow(convert_overlay_heatmap(features[channel], image, alpha))
    return img_from_canvas(canvas)
