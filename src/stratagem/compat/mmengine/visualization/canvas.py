"""Draw shapes, texts and masks on an image."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import torch

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.dist import master_only
from stratagem.compat.mmengine.visualization.utils import (
    blend,
    check_type,
    check_type_and_length,
    color_str2rgb,
    color_val_matplotlib,
    img_from_canvas,
    require_rgb,
    tensor2ndarray,
    value2list,
)
from stratagem.utils import import_module

__all__ = ["DrawingCanvas"]

_PLOT = "plot"
_ARRAY = (np.ndarray, torch.Tensor)
_Array = npt.NDArray[Any] | torch.Tensor
_Colors = str | tuple[int, ...] | list[Any]


class DrawingCanvas:
    """The part of :class:`Visualizer` that draws.

    Args:
        fig_save_cfg: arguments of the figure.
    """

    def __init__(self, fig_save_cfg: dict[str, Any]) -> None:
        self.fig_save_cfg = fig_save_cfg
        self._image: npt.NDArray[Any] | None = None

    # matplotlib is loaded when the figure is used first: most runs draw nothing.
    @functools.cached_property
    def fig_save_canvas(self) -> Any:
        """The canvas of the figure that is drawn on."""
        canvas, self.fig_save, self.ax_save = self._initialize_fig(self.fig_save_cfg)
        return canvas

    @functools.cached_property
    def fig_save(self) -> Any:
        """The figure that is drawn on."""
        return self.fig_save_canvas.figure

    @functools.cached_property
    def ax_save(self) -> Any:
        """The axes that are drawn on."""
        return self.fig_save_canvas.figure.axes[0]

    @functools.cached_property
    def dpi(self) -> float:
        """The number of pixels per inch of the figure."""
        return float(self.fig_save.get_dpi())

    @master_only
    def set_image(self, image: npt.NDArray[Any]) -> None:
        """Set the image to draw on, of shape (H, W, 3) or (H, W).

        Raises:
            AssertionError: if it is None.
        """
        require(image is not None, "set_image() needs an image, got None.")
        image = image.astype("uint8")
        self._image = image
        self.height, self.width = image.shape[:2]
        self._default_font_size = max(math.sqrt(self.height * self.width) // 90, 10)
        # A hundredth of a pixel, so that rounding does not lose one.
        self.fig_save.set_size_inches((self.width + 1e-2) / self.dpi, (self.height + 1e-2) / self.dpi)
        self.ax_save.cla()
        self.ax_save.axis(False)
        self._draw_image(image, "none")

    def _draw_image(self, image: npt.NDArray[Any], interpolation: str) -> None:
        self.ax_save.imshow(image, extent=(0, self.width, self.height, 0), interpolation=interpolation)

    @master_only
    def get_image(self) -> npt.NDArray[np.uint8]:
        """Return the image with what was drawn on it, as RGB.

        Raises:
            AssertionError: if no image was set.
        """
        return self._drawn_image()

    def _drawn_image(self) -> npt.NDArray[np.uint8]:
        require(self._image is not None, "There is no image to draw on. Call set_image() first.")
        return img_from_canvas(self.fig_save_canvas)

    def _initialize_fig(self, fig_cfg: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Return a canvas, a figure and its axes, which fill it."""
        figure = import_module("matplotlib.figure", extra=_PLOT).Figure(**fig_cfg)
        axes = figure.add_subplot()
        axes.axis(False)
        figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
        return import_module("matplotlib.backends.backend_agg", extra=_PLOT).FigureCanvasAgg(figure), figure, axes

    def _is_posion_valid(self, position: npt.NDArray[Any]) -> bool:
        """Return whether all points, of shape (..., 2), are on the image."""
        limits = np.array([self.width, self.height])
        return bool(((position >= 0) & (position < limits)).all())

    def _warn_outside(self, what: str, *points: npt.NDArray[Any]) -> None:
        if not all(map(self._is_posion_valid, points)):
            warnings.warn(
                f"The {what} is out of bounds: a part of it is not on the image of {self.width} x {self.height} pixels.",
                UserWarning,
                stacklevel=4,
            )

    def _widths(self, line_widths: Any, count: int) -> list[float]:
        """Return the width of each line: at least 1, and at most a quarter of the font size."""
        widths = value2list(line_widths, (int, float), count)
        return [min(max(width, 1), self._default_font_size / 4) for width in widths]

    @master_only
    def draw_points(
        self, positions: _Array, colors: _Colors = "g", marker: str | None = None, sizes: _Array | None = None
    ) -> Self:
        """Draw points.

        Args:
            positions: their coordinates, of shape (N, 2) or (2,).
            colors: their colors.
            marker: a marker of matplotlib.
            sizes: the sizes of the markers.
        """
        points = _points("positions", positions, 2)
        self.ax_save.scatter(
            points[:, 0], points[:, 1], c=color_val_matplotlib(colors), s=tensor2ndarray(sizes), marker=marker
        )
        return self

    @master_only
    def draw_texts(
        self,
        texts: str | list[str],
        positions: _Array,
        font_sizes: float | list[float] | None = None,
        colors: _Colors = "g",
        vertical_alignments: str | list[str] = "top",
        horizontal_alignments: str | list[str] = "left",
        font_families: str | list[str] = "sans-serif",
        bboxes: dict[str, Any] | list[dict[str, Any]] | None = None,
        font_properties: Any = None,
    ) -> Self:
        """Draw texts.

        Args:
            texts: the texts.
            positions: their coordinates, of shape (N, 2) or (2,).
            font_sizes: the sizes of the fonts; by default they depend on the size of the image.
            colors: the colors.
            vertical_alignments: "center", "top", "bottom" or "baseline".
            horizontal_alignments: "center", "right" or "left".
            font_families: the families of the fonts.
            bboxes: the properties of the boxes around the texts.
            font_properties: instances of matplotlib's ``FontProperties``, such as for a font file.
        """
        check_type("texts", texts, (str, list))
        texts = value2list(texts, str, 1)
        points = _points("positions", positions, 2, len(texts))
        self._warn_outside("text", points)
        font_class = import_module("matplotlib.font_manager", extra=_PLOT).FontProperties
        number = (int, float)
        options = {
            "size": ("font_sizes", self._default_font_size if font_sizes is None else font_sizes, number),
            "color": ("colors", colors, (str, tuple)),
            "verticalalignment": ("vertical_alignments", vertical_alignments, str),
            "horizontalalignment": ("horizontal_alignments", horizontal_alignments, str),
            "family": ("font_families", font_families, str),
            "fontproperties": ("font_properties", font_properties, font_class),
            "bbox": ("bboxes", bboxes, dict),
        }
        lists = {
            name: _one_per_text(argument, value, types, len(texts))
            for name, (argument, value, types) in options.items()
        }
        lists["color"] = color_val_matplotlib(lists["color"])
        for i, text in enumerate(texts):
            self.ax_save.text(*points[i].tolist(), text, **{name: values[i] for name, values in lists.items()})
        return self

    @master_only
    def draw_lines(
        self,
        x_datas: _Array,
        y_datas: _Array,
        colors: _Colors = "g",
        line_styles: str | list[str] = "-",
        line_widths: float | list[float] = 2,
    ) -> Self:
        """Draw line segments.

        Args:
            x_datas: the x coordinates of both ends of each line, of shape (N, 2) or (2,).
            y_datas: the y coordinates, of the same shape.
            colors: the colors.
            line_styles: styles of matplotlib.
            line_widths: the widths in points.
        """
        xs, ys = _points("x_datas", x_datas, 2), _points("y_datas", y_datas, 2)
        require(xs.shape == ys.shape, f"x_datas has the shape {xs.shape}, and y_datas has {ys.shape}.")
        lines = np.stack([xs, ys], axis=-1)
        self._warn_outside("line", lines)
        collection = import_module("matplotlib.collections", extra=_PLOT).LineCollection(
            lines.tolist(), colors=color_val_matplotlib(colors), linestyles=line_styles, linewidths=line_widths
        )
        self.ax_save.add_collection(collection)
        return self

    @master_only
    def draw_circles(
        self,
        center: _Array,
        radius: _Array,
        edge_colors: _Colors = "g",
        line_styles: str | list[str] = "-",
        line_widths: float | list[float] = 2,
        face_colors: _Colors = "none",
        alpha: float = 0.8,
    ) -> Self:
        """Draw circles.

        Args:
            center: the coordinates of their centers, of shape (N, 2) or (2,).
            radius: their radii, of shape (N,).
            edge_colors: the colors of the lines.
            line_styles: styles of matplotlib.
            line_widths: the widths of the lines in points.
            face_colors: the colors of the areas.
            alpha: how opaque they are, from 0 to 1.
        """
        check_type("radius", radius, _ARRAY)
        radii = tensor2ndarray(radius)
        centers = _points("center", center, 2, len(radii))
        self._warn_outside("circle", centers - radii.reshape(-1, 1), centers + radii.reshape(-1, 1))
        circle = import_module("matplotlib.patches", extra=_PLOT).Circle
        circles = [circle(tuple(point), size) for point, size in zip(centers.tolist(), radii.tolist(), strict=True)]
        collection = import_module("matplotlib.collections", extra=_PLOT).PatchCollection(
            circles,
            alpha=alpha,
            facecolors=color_val_matplotlib(face_colors),
            edgecolors=color_val_matplotlib(edge_colors),
            linewidths=self._widths(line_widths, len(circles)),
            linestyles=line_styles,
        )
        self.ax_save.add_collection(collection)
        return self

    @master_only
    def draw_bboxes(
        self,
        bboxes: _Array,
        edge_colors: _Colors = "g",
        line_styles: str | list[str] = "-",
        line_widths: float | list[float] = 2,
        face_colors: _Colors = "none",
        alpha: float = 0.8,
    ) -> Self:
        """Draw boxes with the corners (x1, y1) and (x2, y2), of shape (N, 4) or (4,); see :meth:`draw_circles`."""
        boxes = _points("bboxes", bboxes, 4)
        require(
            (boxes[:, :2] <= boxes[:, 2:]).all(), f"The first corner of a box must be the upper left one, got {boxes}."
        )
        self._warn_outside("bbox", boxes.reshape(-1, 2, 2))
        corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
        return self._draw_polygons(list(corners), edge_colors, line_styles, line_widths, face_colors, alpha)

    @master_only
    def draw_polygons(
        self,
        polygons: _Array | list[_Array],
        edge_colors: _Colors = "g",
        line_styles: str | list[str] = "-",
        line_widths: float | list[float] = 2,
        face_colors: _Colors = "none",
        alpha: float = 0.8,
    ) -> Self:
        """Draw polygons with the given corners, each of shape (M, 2); see :meth:`draw_circles`."""
        check_type("polygons", polygons, (list, *_ARRAY))
        corners = [tensor2ndarray(each) for each in (polygons if isinstance(polygons, list) else [polygons])]
        for each in corners:
            require(each.shape[1] == 2, f"The corners of a polygon must have the shape (M, 2), but got {each.shape}.")
        self._warn_outside("polygon", *corners)
        return self._draw_polygons(corners, edge_colors, line_styles, line_widths, face_colors, alpha)

    def _draw_polygons(
        self, corners: list[Any], edge_colors: Any, line_styles: Any, line_widths: Any, face_colors: Any, alpha: float
    ) -> Self:
        collection = import_module("matplotlib.collections", extra=_PLOT).PolyCollection(
            corners,
            alpha=alpha,
            facecolor=color_val_matplotlib(face_colors),
            linestyles=line_styles,
            edgecolors=color_val_matplotlib(edge_colors),
            linewidths=self._widths(line_widths, len(corners)),
        )
        self.ax_save.add_collection(collection)
        return self

    @master_only
    def draw_binary_masks(self, binary_masks: _Array, colors: _Colors = "g", alphas: float | list[float] = 0.8) -> Self:
        """Color the pixels at which a mask is true.

        Args:
            binary_masks: the masks, of type bool and shape (N, H, W) or (H, W).
            colors: their colors.
            alphas: how opaque they are, from 0 to 1.

        Raises:
            AssertionError: if the type, the shape or a color is wrong.
        """
        check_type("binary_masks", binary_masks, _ARRAY)
        masks = tensor2ndarray(binary_masks)
        require(masks.dtype == np.bool_, f"The dtype of binary_masks should be np.bool_, but got {masks.dtype}.")
        masks = masks[None] if masks.ndim == 2 else masks
        image = self._drawn_image()
        require(
            image.shape[:2] == masks.shape[1:],
            f"binary_masks must have the size of the image, {image.shape[:2]}, but got {masks.shape[1:]}.",
        )
        check_type_and_length("colors", colors, (str, tuple, list), len(masks))
        listed = value2list(colors, (str, tuple), len(masks))
        opacities = value2list(alphas, float, len(masks))
        for mask, color, alpha in zip(masks, listed, opacities, strict=False):
            colored = image.copy()
            colored[mask] = color_str2rgb(color) if isinstance(color, str) else require_rgb(color)
            image = blend(image, colored, alpha)
        self._draw_image(image, "nearest")
        return self


def _points(name: str, values: Any, size: int, count: int | None = None) -> npt.NDArray[Any]:
    """Return coordinates as an array of shape (N, size).

    Raises:
        TypeError: if they are not an array or a tensor.
        AssertionError: if their shape is different.
    """
    check_type(name, values, _ARRAY)
    array = tensor2ndarray(values)
    array = array[None] if array.ndim == 1 else array
    expected = "N" if count is None else count
    require(
        array.ndim == 2 and array.shape[1] == size and (count is None or len(array) == count),
        f"The shape of `{name}` should be ({expected}, {size}), but got {array.shape}.",
    )
    return cast("npt.NDArray[Any]", array)


def _one_per_text(name: str, value: Any, types: Any, count: int) -> Any:
    if value is None:
        return [None] * count
    check_type_and_length(name, value, (*(types if isinstance(types, tuple) else (types,)), list), count)
    return value2list(value, types, count)
