"""Show or store predictions of a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stratagem.compat.mmengine.hooks.hook import DATA_BATCH, Hook
from stratagem.compat.mmengine.registry import HOOKS
from stratagem.compat.mmengine.utils.dl_utils import tensor2imgs
from stratagem.compat.mmengine.visualization.utils import resize_image

__all__ = ["NaiveVisualizationHook"]


@HOOKS.register_module()
class NaiveVisualizationHook(Hook):
    """Pass samples of a test and their predictions to ``runner.visualizer.add_datasample``.

    Args:
        interval: the predictions of every ``interval``-th batch are passed.
        draw_gt: whether to draw the ground truth.
        draw_pred: whether to draw the prediction.
    """

    priority = "NORMAL"

    def __init__(self, interval: int = 1, draw_gt: bool = True, draw_pred: bool = True) -> None:
        self.draw_gt = draw_gt
        self.draw_pred = draw_pred
        self._interval = interval

    def before_train(self, runner: Any) -> None:
        runner.visualizer.add_graph(runner.model, None)

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None, outputs: Sequence[Any] | None = None
    ) -> None:
        if not self.every_n_inner_iters(batch_idx, self._interval):
            return
        for data, output in zip(data_batch or (), outputs or (), strict=False):
            sample = data["data_sample"]
            image = tensor2imgs(data["inputs"], **sample.get("img_norm_cfg", {}))[0]
            shape = (sample.ori_width, sample.ori_height)
            if "pad_shape" in sample:
                image = self._unpad(image, sample.get("scale", shape))
            runner.visualizer.add_datasample(
                Path(sample.img_path).name,
                resize_image(image, (shape[1], shape[0])),
                sample,
                output,
                self.draw_gt,
                self.draw_pred,
            )

    def _unpad(self, image: npt.NDArray[np.uint8], unpad_shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """Return an image without the padding at the right and at the bottom, by its width and height before."""
        width, height = unpad_shape
        return image[:height, :width]
