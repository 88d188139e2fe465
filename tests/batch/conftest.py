"""A tiny checkpoint and its data, for all tests of `ivtp batch`."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image

from modeling_ivtp.batch import actor, cluster, pipeline
from modeling_ivtp.checkpoints.convert import convert
from modeling_ivtp.serving import answering
from tests.support.batches import QUESTIONS, answer_here, connected_here, write_rows
from tests.support.checkpoints import PRUNING, clip_folder, llava_folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where `datasets` keeps what it read; not in the person's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Answer in this process: Ray takes seconds to start. test_ray.py has processes of its own."""
    monkeypatch.setattr(cluster, "connected", connected_here)
    monkeypatch.setattr(pipeline, "answer_all", answer_here)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A tiny checkpoint, pictures, and a data set of 40 rows with pictures, several or none."""
    root = tmp_path_factory.mktemp("batch")
    clip_folder(root / "clip", llava_folder(root / "llava"))
    convert(root / "llava", root / "clip", root / "ivtp", pruning=PRUNING)
    (root / "pictures").mkdir()
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(256, (60, 90, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / "pictures" / f"{number}.png")
    rows = []
    for number in range(40):
        pictures = [f"pictures/{number % 5}.png", "pictures/0.png"][: number % 3]
        rows.append({"name": f"n{number}", "image": pictures, "question": QUESTIONS[number % 4]})
    write_rows(root / "rows.jsonl", rows)
    model, processor = answering.load_model(root / "ivtp", device="cpu")
    return SimpleNamespace(
        root=root, ivtp=root / "ivtp", rows=rows, data=root / "rows.jsonl", model=model, processor=processor
    )


@pytest.fixture
def loaded(sample, monkeypatch):
    """The checkpoint as it is loaded once, for tests that are not about loading."""
    monkeypatch.setattr(actor, "load_model", lambda *_, **__: (sample.model, sample.processor))
