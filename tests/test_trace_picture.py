"""The picture as the model sees it, whatever it came as."""

import numpy as np
import pytest
from PIL import Image


@pytest.mark.parametrize("size", [(640, 427), (300, 451), (336, 336)])
def test_the_picture_is_cut_as_clip_cuts_it(trace, size):
    from transformers import CLIPImageProcessor

    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    picture = Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))
    processor = CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_normalize=False
    )
    seen = processor(picture, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0).numpy()
    patches = seen.reshape(24, 14, 24, 14, 3)[:, 7, :, 7].reshape(-1, 3)
    np.testing.assert_allclose(pixels(trace.plot(picture, stages=[]).axes[0]), patches, atol=0.006)


def test_the_same_picture_in_every_form_gives_the_same_panel(trace, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "noise.png")
    forms = [Image.fromarray(array), array, array.transpose(2, 0, 1), array / 255, tmp_path / "noise.png"]
    first, *others = [pixels(trace.plot(form, stages=[]).axes[0]) for form in [*forms, str(forms[-1])]]
    for other in others:
        np.testing.assert_array_equal(first, other)
    assert (np.ptp(pixels(trace.plot(array[..., 0], stages=[]).axes[0]), axis=1) == 0).all()
