"""`from_llava` joins a LLaVA with CLIP's text half, wherever that comes from."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_ivtp import IVTPLlavaForConditionalGeneration, IVTPLlavaProcessor
from modeling_ivtp.checkpoints.clip_checkpoint import load_clip_text
from modeling_ivtp.model.checkpoint_ivtp import CLIP_READERS, read_clip
from tests.support import stranger
from tests.support.checkpoints import PRUNING, clip_folder, llava_folder, open_clip_file
from tests.support.text_tokenizers import clip_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    llava = llava_folder(folder / "llava")
    clip_folder(folder / "clip", llava)
    open_clip_file(folder / "open_clip.safetensors")
    return folder


def join(folder, clip="clip", **options):
    return IVTPLlavaForConditionalGeneration.from_llava(
        folder / "llava", clip=None if clip is None else folder / clip, **{"pruning": PRUNING} | options
    ).eval()


@pytest.mark.parametrize("clip", ["clip", "open_clip.safetensors"])
@torch.no_grad()
def test_the_joined_model_saves_loads_and_is_guided_by_the_question(folder, tmp_path, clip):
    model = join(folder, clip)
    assert model.model.has_text_tower
    assert not any(parameter.is_meta for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again, info = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = IVTPLlavaProcessor.from_llava(folder / "llava", clip_tokenizer=clip_tokenizer())
    picture = Image.effect_mandelbrot((60, 60), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    inputs = processor(images=picture, text="USER: <image>\nWhat is it? ASSISTANT:", return_tensors="pt")
    inputs["clip_input_ids"] = inputs["clip_input_ids"][..., :20]
    with model.pruning(relevance_threshold=-1.0, strict=True):
        tokens = model.explain(processor=processor, **inputs).images[0].tokens
        assert "".join(token.text for token in tokens).replace("▁", " ").strip() == "What is it?"
        with again.pruning(relevance_threshold=-1.0):
            assert torch.equal(model(**inputs).logits, again.eval()(**inputs).logits)


TYPES_AND_PLACES = [{"dtype": torch.bfloat16}, {"device_map": "auto"}, {"dtype": torch.float16, "device_map": "cpu"}]


@pytest.mark.parametrize("options", TYPES_AND_PLACES)
def test_the_text_half_gets_the_towers_type_and_place(folder, options):
    model = join(folder, **options)
    assert {p.dtype for p in model.parameters()} == {options.get("dtype", torch.float32)}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_without_clip_there_is_no_text_tower(folder):
    assert not join(folder, None).model.has_text_tower


def test_another_clip_is_refused_by_its_width(folder, tmp_path):
    clip_folder(tmp_path, hidden_size=32)
    with pytest.raises(ValueError, match=r"32 wide, that of .* is 64: take the CLIP"):
        IVTPLlavaForConditionalGeneration.from_llava(folder / "llava", clip=tmp_path, pruning=PRUNING)


def test_another_clip_of_the_same_width_is_told(folder, tmp_path):
    clip_folder(tmp_path)
    with pytest.warns(UserWarning, match="is not that of"):
        IVTPLlavaForConditionalGeneration.from_llava(folder / "llava", clip=tmp_path, pruning=PRUNING)


def test_options_that_do_not_fit_are_refused_before_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(IVTPLlavaForConditionalGeneration, "from_pretrained", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(ValueError, match="decoder_layers=12, but the model has only 4"):
        IVTPLlavaForConditionalGeneration.from_llava(folder / "llava", pruning={})


def test_an_incomplete_llava_is_refused(folder, tmp_path):
    llava_folder(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if "layers.1.mlp" in name)
    del state[name]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"not a complete LLaVA checkpoint: .*layers\.1\.mlp"):
        IVTPLlavaForConditionalGeneration.from_llava(tmp_path, pruning=PRUNING)


@pytest.mark.parametrize("shards", ["5GB", "50KB"], ids=["one file", "shards"])
def test_the_model_reads_the_same_clip_as_the_converter(folder, tmp_path, shards, capfd):
    clip_folder(tmp_path).save_pretrained(tmp_path, max_shard_size=shards)
    model_reads, converter_reads = read_clip(tmp_path), load_clip_text(tmp_path).load()
    assert capfd.readouterr().err.count("vision_model") == 0
    assert model_reads.text_config.to_dict() == converter_reads.text_config.to_dict()
    assert model_reads.vision_width == converter_reads.vision_width
    assert model_reads.text_model.keys() == converter_reads.text_model.keys()
    for name, tensor in converter_reads.text_model.items():
        assert torch.equal(model_reads.text_model[name], tensor), name
    assert torch.equal(model_reads.visual_projection, converter_reads.visual_projection)
    assert torch.equal(model_reads.class_embedding, converter_reads.class_embedding)


def edit(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("text_projection.weight"), r"not a complete CLIP: .*text_projection\.weight"),
        (lambda state: state.pop("visual_projection.weight"), r"not a complete CLIP: .*visual_projection\.weight"),
        (lambda state: state.pop("text_model.encoder.layers.1.mlp.fc1.bias"), r"not a complete CLIP: .*mlp\.fc1\.bias"),
        (lambda state: state.update({"visual_projection.weight": torch.zeros(9, 64)}), r"not a complete CLIP: .*9, 64"),
    ],
)
def test_a_clip_that_is_not_whole_is_refused(folder, tmp_path, change, message):
    clip_folder(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        join(folder, tmp_path)


def test_a_clip_without_class_embedding_is_joined_without_a_comparison(folder, tmp_path, recwarn):
    clip_folder(tmp_path)
    edit(tmp_path, lambda state: state.pop("vision_model.embeddings.class_embedding"))
    edit(tmp_path, lambda state: state.update(another_head=torch.zeros(1)))
    assert join(folder, tmp_path).model.has_text_tower
    assert not [warning for warning in recwarn if "is not that of" in str(warning.message)]


def test_a_damaged_clip_is_named(folder, tmp_path):
    clip_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(OSError, match=r"model\.safetensors is damaged or cut short"):
        join(folder, tmp_path)


def test_other_models_and_formats_are_no_clip(folder, tmp_path):
    with pytest.raises(ValueError, match="is of model_type 'llava'; CLIP's text tower comes from one of type 'clip'"):
        join(folder, "llava")
    clip_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        join(folder, tmp_path)


@pytest.mark.slow
def test_open_clip_needs_the_package(folder, monkeypatch):
    monkeypatch.delitem(CLIP_READERS, "open_clip")
    assert join(folder, "clip").model.has_text_tower
    with pytest.raises(ImportError, match=r"open_clip\.safetensors is a CLIP of open_clip.*pip install ivtp-llava"):
        join(folder, "open_clip.safetensors")
    with pytest.raises(ImportError, match=r"open_clip:ViT-L-14-336/openai is a CLIP of open_clip"):
        read_clip("open_clip:ViT-L-14-336/openai")


STRANGER = """
import json
from transformers import AutoModelForImageTextToText
folder, llava, clip, pruning = sys.argv[1:]
cls = type(AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True))
model = cls.from_llava(llava, clip=clip, pruning=json.loads(pruning))
try:
    cls.from_llava(llava, clip="open_clip:ViT-L-14-336/openai", pruning=json.loads(pruning))
except ImportError as error:
    refused = str(error)
print(json.dumps([cls.__module__, sorted(name for name, _ in model.named_parameters()), refused]))
"""


@pytest.mark.slow
def test_a_stranger_without_the_package_joins_a_clip_of_transformers(folder, tmp_path):
    model = join(folder)
    model.save_pretrained(tmp_path / "ours")
    printed = stranger.run(
        STRANGER, tmp_path / "ours", folder / "llava", folder / "clip", json.dumps(PRUNING), home=tmp_path
    )
    module, names, refused = json.loads(printed.splitlines()[-1])
    assert module.startswith("transformers_modules")
    assert names == sorted(name for name, _ in model.named_parameters())
    assert "pip install ivtp-llava" in refused
