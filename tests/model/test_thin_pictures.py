"""A long and thin picture takes little memory at every door, and the model sees the same pixels of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from modeling_ivtp.model.processing_ivtp import LONGEST
from tests.support.text_tokenizers import processor as make_processor

ROOT = Path(__file__).parents[2]


def noise(width, height):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def processor():
    return make_processor(size=28)


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (1501, 7), (4, 1001), (3001, 14), (29, 6001), (28, 5000)])
def test_the_model_sees_the_pixels_of_the_whole_picture(processor, size):
    picture = noise(*size)
    cropped = processor.crop_thin(picture)
    assert max(cropped.size) <= (LONGEST + 2) * min(size) < max(size)
    whole = processor.image_processor(picture, return_tensors="np", do_rescale=False, do_normalize=False)
    part = processor(images=picture, return_tensors="np", do_rescale=False, do_normalize=False)
    difference = np.abs(whole["pixel_values"].astype(int) - part["pixel_values"].astype(int))
    # Where the scaled length is not a whole number, its last fraction is lost, a little earlier in a shorter picture.
    assert difference.max() <= (0 if 28 * max(size) % min(size) == 0 else 1)
    seen = np.asarray(processor.as_seen(picture)).transpose(2, 0, 1)
    assert np.array_equal(seen, part["pixel_values"][0])


FORMS = {
    "rows last": lambda values: values,
    "channels first": lambda values: values.transpose(2, 0, 1),
    "batch": lambda values: values[None],
    "tensor": lambda values: torch.from_numpy(values.transpose(2, 0, 1).copy()),
    "batch of tensors": lambda values: torch.from_numpy(values.transpose(2, 0, 1).copy())[None],
    "grey": lambda values: values[..., :1],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(2, 2000), (2000, 7)])
def test_arrays_and_tensors_are_cropped_alike(processor, size, form):
    picture = noise(*size)
    values = FORMS[form](np.array(picture))
    cropped = processor.crop_thin(values)
    wanted = FORMS[form](np.asarray(processor.crop_thin(picture)))
    assert type(cropped) is type(values)
    assert max(cropped.shape) < 2000
    assert np.array_equal(np.asarray(cropped), np.asarray(wanted))
    options = {"return_tensors": "np", "do_rescale": False, "do_normalize": False}
    if form == "grey":
        options |= {"image_mean": [0.5], "image_std": [0.5], "do_convert_rgb": False}
    whole = processor.image_processor(values, **options)["pixel_values"]
    part = processor(images=values, **options)["pixel_values"]
    assert np.abs(whole.astype(int) - part.astype(int)).max() <= 1


def test_what_is_no_picture_stays_as_it_is(processor):
    for values in (np.zeros((4, 4000)), np.zeros((4000, 7, 9)), torch.zeros(3, 0, 5), "picture.png"):
        assert processor.crop_thin(values) is values
    told = np.zeros((1, 4000, 3), np.uint8)
    assert processor.crop_thin(told, "channels_last").shape < told.shape
    assert processor(images=told, input_data_format="channels_last", return_tensors="pt")["pixel_values"].shape[1] == 3


@pytest.mark.parametrize("size", [(60, 60), (28, 2800), (2000, 100)])
def test_other_pictures_stay_as_they_are(processor, size):
    picture = noise(*size)
    assert processor.crop_thin(picture) is picture


@pytest.mark.slow
def test_a_size_of_ones_own_is_not_cropped_for(processor):
    whole = processor.image_processor(noise(400, 2), do_center_crop=False, return_tensors="np")["pixel_values"]
    own = processor(images=noise(400, 2), do_center_crop=False, return_tensors="np")["pixel_values"]
    assert np.array_equal(own, whole)
    squares = make_processor(size=28)
    squares.image_processor = CLIPImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False)
    picture = noise(3000, 2)
    assert squares.crop_thin(picture) is picture


MEASURE = """
import base64, io, resource, sys
from PIL import Image
from modeling_ivtp.batch.asking import Asker
from modeling_ivtp.batch.data import Row
from modeling_ivtp.batch.budget import Task
from modeling_ivtp.serving.answering import prepare
from modeling_ivtp.serving.server import load_handler

def encoded(size):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

handler = load_handler("examples/miniature")
asker = Asker(handler.model, handler.processor, 4)
prompt = "USER: <image>\\nWhat? ASSISTANT:"
doors = {
    "generate": lambda size: prepare(handler.model, handler.processor, [Image.new("RGB", size)], prompt),
    "batch": lambda size: asker.prepare([Task(Row(0, None, "What?", (encoded(size),), None), prompt, 600)]),
    "endpoint": lambda size: handler({"inputs": {"image": encoded(size), "text": "What?"}}),
}
door = doors[sys.argv[1]]
door((400, 300))
before = peak()
door((1, 2000))
door((20_000, 1))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("door", ["generate", "batch", "endpoint"])
def test_a_thin_picture_takes_little_memory(door):
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, door], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout.split()[-1]) < 200  # MB; 1 x 2,000 pixels took 1,500
