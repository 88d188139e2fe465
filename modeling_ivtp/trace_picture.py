"""The picture behind every panel of a trace: as the model sees it, and with what was dropped dimmed."""

from __future__ import annotations

import math
import os
from importlib import import_module
from typing import Any

from torch import Tensor


def plot_module(name: str) -> Any:
    """A module that only a picture needs.

    Raises
    ------
    ImportError
        If it is not installed, with the command that installs it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError("PruningTrace.plot needs matplotlib: pip install ivtp-llava[plot]") from error


def square(image: Any, grid: tuple[int, int]) -> Any:
    """The part of the picture that the grid covers, as (rows * c, columns * c, 3) floats in 0 to 1, c pixels a patch.

    Resizing the shortest side and cutting out the centre, as CLIP's image processor does, takes the largest centred
    square; here it is cut from the original, so that it is as sharp as the original allows.

    Parameters
    ----------
    image : PIL.Image.Image, numpy.ndarray or path
        An array is (H, W), (H, W, C) or (C, H, W), in 0 to 255 or, for floats, 0 to 1.
    grid : tuple of int
        Rows and columns of patches.

    Raises
    ------
    ImportError
        Without matplotlib.
    ValueError
        If `image` is no such picture.
    """
    np, pil, ops = plot_module("numpy"), plot_module("PIL.Image"), plot_module("PIL.ImageOps")
    if isinstance(image, str | os.PathLike):
        try:
            with pil.open(image) as file:
                picture = ops.exif_transpose(file).convert("RGB")
        except pil.UnidentifiedImageError as error:
            raise ValueError(f"image={os.fspath(image)!r} is not an image file") from error
    elif isinstance(image, pil.Image):
        picture = image.convert("RGB")
    elif isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
            array = np.moveaxis(array, 0, 2)
        if array.size == 0 or array.ndim != 3 or array.shape[2] not in (1, 3, 4):
            raise ValueError(f"image of shape {image.shape}: expected (H, W), (H, W, C) or (C, H, W), C = 1, 3 or 4")
        top = 1 if np.issubdtype(array.dtype, np.floating) else 255
        if array.min() < 0 or not array.max() <= top:
            raise ValueError(
                f"image of {array.dtype} from {array.min():.4g} to {array.max():.4g}: expected integers in 0 to 255 or "
                "floats in 0 to 1, a picture as it is before the processor normalises it"
            )
        colors = array[..., :3].repeat(3 if array.shape[2] == 1 else 1, axis=2)
        picture = pil.fromarray(np.round(colors * (255 / top)).astype(np.uint8))
    else:
        raise ValueError(f"image of type {type(image).__name__}: expected a PIL image, a NumPy array or a path")
    rows, columns = grid
    cell = math.ceil(768 / max(grid))
    side = min(picture.width / columns, picture.height / rows)
    left, upper = (picture.width - side * columns) / 2, (picture.height - side * rows) / 2
    cut = (left, upper, left + side * columns, upper + side * rows)
    return np.asarray(picture.resize((columns * cell, rows * cell), pil.Resampling.LANCZOS, box=cut)) / 255


def dim(picture: Any, mask: Tensor) -> Any:
    """The picture, grey and dark but still legible where a patch was dropped.

    Parameters
    ----------
    picture : numpy.ndarray
        (rows * c, columns * c, 3) floats in 0 to 1, as `square` makes it.
    mask : Tensor
        (rows, columns) bool, on the CPU: the patches that were kept.
    """
    cell = picture.shape[0] // mask.shape[0]
    kept = mask.numpy().repeat(cell, 0).repeat(cell, 1)[..., None]
    grey = (picture @ [0.299, 0.587, 0.114])[..., None]
    return picture * kept + (0.38 * (0.82 * grey + 0.18 * picture) + 0.08) * ~kept


def as_image(picture: Any) -> Any:
    """Floats in 0 to 1 as a PIL.Image.Image."""
    return plot_module("PIL.Image").fromarray((picture * 255).round().astype("uint8"))
