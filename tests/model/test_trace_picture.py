"""The picture as the model sees it, whatever it came as, and with its dropped patches dimmed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from modeling_ivtp.model.trace_plot import dim, square
from tests.support.traces import COFFEE


def centres(picture, rows=24, columns=24):
    """The pixel in the middle of every patch."""
    height, width = (length // many for length, many in zip(picture.shape, (rows, columns), strict=False))
    return picture[height // 2 :: height, width // 2 :: width].reshape(-1, 3)


@pytest.mark.parametrize("size", [(640, 427), (300, 451), (336, 336)])
def test_the_picture_is_cut_as_clip_cuts_it(size):
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    picture = Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))
    processor = CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_normalize=False
    )
    seen = processor(picture, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(centres(square(picture, (24, 24))), centres(seen), atol=0.006)


@pytest.mark.parametrize("grid", [(24, 24), (3, 5), (7, 2)])
def test_every_patch_has_the_same_whole_number_of_pixels(grid):
    height, width, colors = square(COFFEE, grid).shape
    assert (height / grid[0], colors) == (width / grid[1], 3)
    assert max(height, width) >= 768


def test_the_same_picture_in_every_form_is_the_same_picture(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "noise.png")
    forms = [Image.fromarray(array), array, array.transpose(2, 0, 1), array / 255, tmp_path / "noise.png"]
    first, *others = [square(form, (24, 24)) for form in [*forms, str(forms[-1])]]
    for other in others:
        np.testing.assert_array_equal(first, other)
    assert (np.ptp(square(array[..., 0], (24, 24)), axis=2) == 0).all()


def test_dropped_patches_are_dim_and_kept_ones_untouched():
    picture, mask = square(COFFEE, (24, 24)), torch.arange(576).view(24, 24) % 5 == 0
    before, after, kept = centres(picture), centres(dim(picture, mask)), mask.flatten().numpy()
    np.testing.assert_array_equal(after[kept], before[kept])
    bright = ~kept & (before.mean(1) > 0.4)
    assert bright.sum() > 100
    assert (after[bright].mean(1) < 0.75 * before[bright].mean(1)).all()
    assert np.ptp(after[~kept], axis=1).max() < 0.1
    assert after[~kept].std() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8), "image of type Tensor"),
        (None, "image of type NoneType"),
        (np.zeros((2, 8, 8)), r"image of shape \(2, 8, 8\)"),
        (np.zeros((0, 8, 3)), r"image of shape \(0, 8, 3\)"),
        (np.full((8, 8, 3), -1.5), "image of float64 from -1.5 to -1.5"),
        (np.full((8, 8, 3), np.nan), "image of float64 from nan to nan"),
        (Path(__file__), r"image='.*test_trace_picture.py' is not an image file"),
    ],
)
def test_what_is_no_picture_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        square(image, (24, 24))
