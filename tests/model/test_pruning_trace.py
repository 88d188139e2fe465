"""The record of what was pruned: its numbers, its one line and its JSON."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from modeling_ivtp.files.sizes import human_bytes
from modeling_ivtp.model.trace import PruningTrace, TokenTrace
from tests.support.traces import image_trace, pruning_trace, spell

PATH = Path(__file__).parents[2] / "modeling_ivtp/model/trace.py"


@pytest.fixture
def trace():
    return pruning_trace()


def test_its_files_ask_for_nothing_that_transformers_does_not_bring():
    files = {PATH, *map(Path, get_relative_import_files(PATH))}
    assert {"trace", "trace_plot"} <= {file.stem for file in files}
    for file in files:
        # NumPy picks diverse tokens, and huggingface_hub names its errors; transformers itself depends on both.
        brought = {"huggingface_hub", "numpy", "torch", "transformers"}
        assert set(get_imports(file)) - set(sys.stdlib_module_names) <= brought


def test_none_of_its_files_needs_one_that_needs_it():
    for file in map(Path, get_relative_import_files(PATH)):
        assert str(file) not in get_relative_import_files(file)


def test_numbers_follow_from_the_groups(trace):
    assert trace.images[0].counts == (576, 120, 64)
    assert trace.final_tokens == (64,)
    assert trace.layer_averaged_tokens == (3 * (120 + 103 + 88 + 75) + 20 * 64) / 32
    assert trace.kv_bytes_saved == 22_800_000


def test_summary_fits_on_one_line(trace):
    assert trace.summary() == (
        "1 image: 576 → 120 in the tower, → 64 in the decoder (76.2 layer-averaged); KV cache 12.3 MB of 35.1 MB; "
        "key words: How many clocks wall"
    )
    assert repr(trace) == f"PruningTrace({trace.summary()})"
    assert repr(trace.images[0]).startswith("ImageTrace(row 0, 576 → 120 → 64 tokens, pseudo_cls, key words: How")
    assert repr(trace.images[0].groups[0]) == "GroupTrace(tower, layers 0 to 2: 576 → 473)"


@pytest.mark.parametrize("size", [0, 999, 1000, 999_499, 999_500, 35_100_000, 999_600_000, 13_500_000_000])
def test_sizes_read_as_those_of_the_commands(size):
    assert (
        f"KV cache {human_bytes(size)} of {human_bytes(20 * 10**9)};"
        in replace(pruning_trace(image_trace()), kv_bytes=size, kv_bytes_unpruned=20 * 10**9).summary()
    )


def test_summary_of_unequal_images_and_of_none():
    smaller = image_trace(decoder=(32, 2), tokens=())
    assert (
        "2 images: 576 → 120 in the tower, → 32 to 64 in the decoder" in pruning_trace(image_trace(), smaller).summary()
    )
    assert PruningTrace((), 0, 0, ()).summary() == "no image"
    assert PruningTrace((), 0, 0, ()).layer_averaged_tokens == 0
    assert "no key words" in pruning_trace(smaller).summary()


@pytest.mark.slow
def test_to_dict_survives_json():
    tokens = (*spell(["▁a"]), TokenTrace(41, 7, "▁b", math.nan, True))
    trace = pruning_trace(image_trace((4, 4), (8, 2), (4, 1), tokens), image_trace())
    record = trace.to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    group, token = record["images"][0]["groups"][0], record["images"][0]["tokens"][1]
    assert group["candidates"] == list(range(16))
    assert sum(group["importance"]) == pytest.approx(1)
    assert group["kept"] == trace.images[0].groups[0].kept.tolist()
    assert token == {"position": 41, "token_id": 7, "text": "▁b", "relevance": None, "is_key": True}
    assert record["final_tokens"] == [4, 64]
