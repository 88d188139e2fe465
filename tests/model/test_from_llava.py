"""`from_llava` joins a LLaVA with CLIP's text half, wherever that comes from."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_ivtp import IVTPLlavaForConditionalGeneration, IVTPLlavaProcessor
from tests.support.checkpoints import PRUNING, clip_folder, llava_folder, open_clip_file
from tests.support.text_tokenizers import clip_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    llava = llava_folder(folder / "llava")
    clip_folder(folder / "clip", llava)
    open_clip_file(folder / "open_clip.safetensors")
    return folder


def join(made, clip="clip", **options):
    return IVTPLlavaForConditionalGeneration.from_llava(
        made / "llava", clip=None if clip is None else made / clip, **{"pruning": PRUNING} | options
    ).eval()


@pytest.mark.parametrize("clip", ["clip", "open_clip.safetensors"])
@torch.no_grad()
def test_the_joined_model_saves_loads_and_is_guided_by_the_question(made, tmp_path, clip):
    model = join(made, clip)
    assert model.model.has_text_tower
    assert not any(parameter.is_meta for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again, info = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = IVTPLlavaProcessor.from_llava(made / "llava", clip_tokenizer=clip_tokenizer())
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
def test_the_text_half_gets_the_towers_type_and_place(made, options):
    model = join(made, **options)
    assert {p.dtype for p in model.parameters()} == {options.get("dtype", torch.float32)}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_without_clip_there_is_no_text_tower(made):
    assert not join(made, None).model.has_text_tower


def test_another_clip_is_refused_by_its_width(made, tmp_path):
    clip_folder(tmp_path, hidden_size=32)
    with pytest.raises(ValueError, match=r"32 wide, that of .* is 64: take the CLIP"):
        IVTPLlavaForConditionalGeneration.from_llava(made / "llava", clip=tmp_path, pruning=PRUNING)


def test_another_clip_of_the_same_width_is_told(made, tmp_path):
    clip_folder(tmp_path)
    with pytest.warns(UserWarning, match="is not that of"):
        IVTPLlavaForConditionalGeneration.from_llava(made / "llava", clip=tmp_path, pruning=PRUNING)


def test_options_that_do_not_fit_are_refused_before_weights_are_read(made, monkeypatch):
    monkeypatch.setattr(IVTPLlavaForConditionalGeneration, "from_pretrained", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(ValueError, match="decoder_layers=12, but the model has only 4"):
        IVTPLlavaForConditionalGeneration.from_llava(made / "llava", pruning={})


def test_an_incomplete_llava_is_refused(made, tmp_path):
    llava_folder(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if "layers.1.mlp" in name)
    del state[name]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"not a complete LLaVA checkpoint: .*layers\.1\.mlp"):
        IVTPLlavaForConditionalGeneration.from_llava(tmp_path, pruning=PRUNING)
