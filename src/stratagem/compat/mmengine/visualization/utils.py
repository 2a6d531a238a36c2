"""Helper functions for drawing: arguments, colors, heat maps and windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.errors import ConfigTypeError
from stratagem.utils import import_module

__all__ = [
    "blend",
    "check_length",
    "check_type",
    "check_type_and_length",
    "color_str2rgb",
    "color_val_matplotlib",
    "convert_overlay_heatmap",
    "img_from_canvas",
    "require_rgb",
    "resize_image",
    "tensor2ndarray",
    "value2list",
    "wait_continue",
]

_Image = npt.NDArray[np.uint8]
_PLOT = "plot"


def tensor2ndarray(value: Any) -> Any:
    """Return a tensor as an array on the CPU, and everything else unchanged."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value


def value2list(value: Any, valid_type: Any, expand_dim: int) -> Any:
    """Return ``expand_dim`` times the value in a list if it has one of the types; otherwise the value."""
    return [value] * expand_dim if isinstance(value, valid_type) else value


def check_type(name: str, value: Any, valid_type: Any) -> None:
    """Require that an argument has one of the types.

    Raises:
        TypeError: if not.
    """
    if not isinstance(value, valid_type):
        raise ConfigTypeError(f"`{name}` should be {valid_type}, but got {type(value)}.")


def check_length(name: str, value: Any, valid_length: int) -> None:
    """Require that a list has at least a length.

    Raises:
        AssertionError: if it is a list that is shorter.
    """
    if isinstance(value, list) and len(value) < valid_length:
        raise InvalidArgumentError(f"{name} needs at least {valid_length} elements, but got {len(value)}.")


def check_type_and_length(name: str, value: Any, valid_type: Any, valid_length: int) -> None:
    """Require that an argument has one of the types, and at least a length if it is a list."""
    check_type(name, value, valid_type)
    check_length(name, value, valid_length)


def color_val_matplotlib(colors: Any) -> Any:
    """Return colors as matplotlib expects them: names unchanged, RGB values from 0 to 255 divided by 255.

    Raises:
        TypeError: if a color is neither a name nor a tuple nor a list of these.
        AssertionError: if a tuple does not have three values from 0 to 255.
    """
    if isinstance(colors, str):
        return colors
    if isinstance(colors, list):
        return [color_val_matplotlib(color) for color in colors]
    if not isinstance(colors, tuple):
        raise ConfigTypeError(
            f"A color must be a name or a tuple of three integers, got {colors!r} ({type(colors).__name__})."
        )
    return tuple(channel / 255 for channel in require_rgb(colors))


def require_rgb(color: Any) -> Any:
    """Return a color if it has three values from 0 to 255.

    Raises:
        AssertionError: if not.
    """
    require(
        len(color) == 3 and all(0 <= channel <= 255 for channel in color),
        f"A color must have three values from 0 to 255, got {color!r}.",
    )
    return color


def color_str2rgb(color: str) -> tuple[int, ...]:
    """Return the RGB values, from 0 to 255, of a color that matplotlib knows."""
    return tuple(int(channel * 255) for channel in import_module("matplotlib.colors", extra=_PLOT).to_rgb(color))


def blend(first: _Image, second: _Image, weight: float) -> _Image:
    """Return ``(1 - weight) * first + weight * second``, rounded."""
    mixed = np.rint((1 - weight) * first.astype(np.float32) + weight * second.astype(np.float32))
    return np.clip(mixed, 0, 255).astype(np.uint8)


def resize_image(image: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return an image of shape (H, W, channels) or (H, W) with another height and width, bilinearly interpolated."""
    if tuple(image.shape[:2]) == tuple(shape):
        return image
    channels = torch.from_numpy(np.ascontiguousarray(image.reshape(*image.shape[:2], -1))).permute(2, 0, 1)
    resized = functional.interpolate(channels[None].float(), tuple(shape), mode="bilinear", align_corners=False)[0]
    array = resized.permute(1, 2, 0).numpy().reshape(*shape, *image.shape[2:])
    return (np.rint(array) if np.issubdtype(image.dtype, np.integer) else array).astype(image.dtype)


def convert_overlay_heatmap(feat_map: Any, img: _Image | None = None, alpha: float = 0.5) -> _Image:
    """Return a feature map as a heat map from blue to red, laid over an image if one is given.

    Args:
        feat_map: a tensor or array of shape (H, W), or (channels, H, W) with one or three channels, each of which controls
            the same channel of the result.
        img: an RGB image of shape (H, W, 3).
        alpha: the weight of the heat map.

    Raises:
        AssertionError: if the feature map has another shape.
    """
    values = np.asarray(tensor2ndarray(feat_map), dtype=np.float64)
    require(
        values.ndim == 2 or (values.ndim == 3 and values.shape[0] in (1, 3)),
        f"feat_map must have the shape (H, W), (1, H, W) or (3, H, W), got {values.shape}.",
    )
    if values.ndim == 3:
        values = values.transpose(1, 2, 0)
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    heat = _jet(scaled)
    return heat if img is None else blend(img, heat, alpha)


def _jet(values: npt.NDArray[np.float64]) -> _Image:
    """Return values from 0 to 1, of shape (H, W) or (H, W, channels), in RGB: from blue over green to red."""
    channels = (
        values if values.ndim == 3 and values.shape[2] == 3 else np.repeat(values.reshape(*values.shape[:2], 1), 3, 2)
    )
    centers = np.array([3.0, 2.0, 1.0])
    levels: npt.NDArray[np.float64] = np.clip(1.5 - np.abs(4 * channels - centers), 0, 1)
    return np.rint(255 * levels).astype(np.uint8)


def wait_continue(figure: Any, timeout: float = 0, continue_key: str = " ") -> int:
    """Show a figure until a key is pressed.

    Args:
        figure: a figure of matplotlib.
        timeout: how long to wait at most, in seconds; 0 for no limit.
        continue_key: the key.

    Returns:
        1 if the window was closed; otherwise 0.
    """
    if "inline" in import_module("matplotlib.pyplot", extra=_PLOT).get_backend():
        return 0
    canvas, events = figure.canvas, []

    def receive(event: Any) -> None:
        events.append(event)
        canvas.stop_event_loop()

    if canvas.manager:
        figure.show()
    connections = [canvas.mpl_connect(name, receive) for name in ("key_press_event", "close_event")]
    try:
        while True:
            events.clear()
            canvas.start_event_loop(timeout)
            if any(event.name == "close_event" for event in events):
                return 1
            if not events or any(event.key == continue_key for event in events):
                return 0
    finally:
        for connection in connections:
            canvas.mpl_disconnect(connection)


def img_from_canvas(canvas: Any) -> _Image:
    """Return what is drawn on an Agg canvas of matplotlib as an RGB image of shape (H, W, 3)."""
    buffer, (width, height) = canvas.print_to_buffer()
    rgba = np.frombuffer(buffer, dtype=np.uint8).reshape(height, width, 4)
    return np.array(rgba[..., :3], dtype=np.uint8)
