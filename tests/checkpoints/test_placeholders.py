"""A written folder answers: its processor writes as many placeholders for an image as the model reads features."""

import json
import shutil
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from modeling_ivtp import IVTPLlavaForConditionalGeneration, IVTPLlavaProcessor
from modeling_ivtp.checkpoints.convert import convert
from modeling_ivtp.checkpoints.stock import export_stock
from modeling_ivtp.publish.staging import stage
from modeling_ivtp.serving.answering import answer_text, load_model, prepare
from tests.support.checkpoints import PRUNING, clip_folder, llava_folder, store_processor_as

LAYOUTS = ["preprocessor_config.json alone", "no num_additional_image_tokens", "strategy full"]
PATCHES = 16
PROMPT = "USER: <image>\nWhich animal is this? ASSISTANT:"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("placeholders")
    clip_folder(root / "clip", llava_folder(root / "llava"))
    convert(root / "llava", root / "clip", root / "ours", pruning=PRUNING)
    return SimpleNamespace(root=root, llava=root / "llava", clip=root / "clip", ours=root / "ours")


def aged(source, target, layout):
    shutil.copytree(source, target)
    store_processor_as(target, layout)
    return target


def answers(model_class, folder, processor=None):
    """Whether a model answers from a folder, with the placeholders that it has patches."""
    model = model_class.from_pretrained(folder).eval()
    processor = processor or AutoProcessor.from_pretrained(folder)
    inputs = processor(images=Image.new("RGB", (80, 60)), text=PROMPT, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == PATCHES
    return model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_old_llava_is_converted_into_one_that_answers(folders, tmp_path, layout):
    source = aged(folders.llava, tmp_path / "source", layout)
    convert(source, folders.clip, tmp_path / "out", pruning=PRUNING)
    assert answers(IVTPLlavaForConditionalGeneration, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_ivtp_llava_with_an_old_processor_is_mended_by_every_command(folders, tmp_path, layout):
    source = aged(folders.ours, tmp_path / "source", layout)
    convert(source, None, tmp_path / "again")
    assert answers(IVTPLlavaForConditionalGeneration, tmp_path / "again")
    export_stock(source, tmp_path / "stock")
    assert answers(LlavaForConditionalGeneration, tmp_path / "stock")
    (tmp_path / "repository").mkdir()
    stage(source, "owner/name", tmp_path / "repository")
    assert answers(IVTPLlavaForConditionalGeneration, tmp_path / "repository")
    model, processor = load_model(source)
    assert isinstance(answer_text(model, processor, prepare(model, processor, [Image.new("RGB", (9, 9))], PROMPT)), str)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_llava_in_python_takes_what_is_missing_from_the_model(folders, tmp_path, layout):
    source = aged(folders.llava, tmp_path / "source", layout)
    processor = IVTPLlavaProcessor.from_llava(source, clip_tokenizer=folders.ours / "clip_tokenizer")
    assert answers(IVTPLlavaForConditionalGeneration, folders.ours, processor)
    # What a caller gives stays.
    assert IVTPLlavaProcessor.from_llava(source, patch_size=28).patch_size == 28


def change(folder, file, **values):
    config = json.loads((folder / file).read_text())
    for name, value in values.items():
        *parts, key = name.split("__")
        part = config
        for step in parts:
            part = part[step]
        part[key] = value
    (folder / file).write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "config.json",
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy='full'.*supported is 'default'",
        ),
        (
            "processor_config.json",
            {"image_processor__crop_size": {"height": 28, "width": 28}},
            "writes 4 placeholders.*reads 16 features.*28 x 28 pixels.*56 x 56",
        ),
        ("config.json", {"image_token_index": 5}, "writes 0 placeholders of token 5.*'<image>'"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False], ids=["dry run", "run"])
def test_a_folder_that_cannot_answer_is_not_written(folders, tmp_path, file, values, message, dry_run):
    for name, source, clip in (("llava", folders.llava, folders.clip), ("ours", folders.ours, None)):
        shutil.copytree(source, tmp_path / name)
        change(tmp_path / name, file, **values)
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / name, clip, tmp_path / "out", pruning=PRUNING, dry_run=dry_run)
    with pytest.raises(ValueError, match=message):
        export_stock(tmp_path / "ours", tmp_path / "out", dry_run=dry_run)
    (tmp_path / "repository").mkdir()
    with pytest.raises(ValueError, match=message):
        stage(tmp_path / "ours", "owner/name", tmp_path / "repository")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "ours")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_written_folder_itself_is_checked(folders, tmp_path, monkeypatch):
    """A processor that is right in memory and wrong on the disk is noticed, and nothing is kept."""
    original = IVTPLlavaProcessor.save_pretrained

    def forgetful(self, folder, **options):
        original(self, folder, **options)
        change(folder, "processor_config.json", num_additional_image_tokens=3)

    monkeypatch.setattr(IVTPLlavaProcessor, "save_pretrained", forgetful)
    with pytest.raises(ValueError, match=r"writes 18 placeholders.*reads 16 features"):
        convert(folders.llava, folders.clip, tmp_path / "out", pruning=PRUNING)
    assert not (tmp_path / "out").exists()
