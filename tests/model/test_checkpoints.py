"""Loading official LLaVA folders and ours, sharing them with code, and both ways of loading giving the same tokens."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlavaForConditionalGeneration,
    pipeline,
)
from transformers.trainer_utils import load_sharded_checkpoint

from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration, IVTPLlavaModel
from tests.model.test_stock import stock_twin, without_clip
from tests.support import stranger
from tests.support.text_tokenizers import processor as make_processor
from tests.support.tiny import model_for, prompt, tiny_model

ROWS = [[3, "image", 7], [5], [2, "image", 4, "image", 3]]
PRUNING = {"visual_tokens": 4, "tower_tokens": 9, "layers_per_group": 2, "decoder_layers": 4}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder as llava-hf publishes them: stock class, `model_type: llava`."""
    folder = tmp_path_factory.mktemp("official")
    model = tiny_model()
    stock_twin(model).save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("sharded", [False, True])
@torch.no_grad()
def test_an_official_folder_loads_with_nothing_missing_and_nothing_unexpected(official, tmp_path, sharded):
    folder, original = official
    if sharded:
        LlavaForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="60KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        folder = tmp_path
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llava"
    config = IVTPLlavaConfig.from_pretrained(folder, pruning=PRUNING)
    model, info = IVTPLlavaForConditionalGeneration.from_pretrained(folder, config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    model.eval()
    inputs = without_clip(prompt(ROWS))
    with original.pruning(guidance="visual_cls"):
        expected = original(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    assert not model.model.has_text_tower


def test_an_official_folder_loads_without_a_warning_about_its_type(official, caplog):
    folder, _ = official
    logger = logging.getLogger("transformers.configuration_utils")
    logger.addHandler(caplog.handler)
    try:
        config = IVTPLlavaConfig.from_pretrained(folder, pruning=PRUNING)
    finally:
        logger.removeHandler(caplog.handler)
    assert config.model_type == "ivtp_llava"
    assert not caplog.records


def test_a_file_that_is_cut_short_is_named(official, tmp_path):
    folder, _ = official
    shutil.copytree(folder, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for load in (IVTPLlavaForConditionalGeneration.from_pretrained, IVTPLlavaForConditionalGeneration.from_llava):
        with pytest.raises(OSError, match=r"cut/model\.safetensors is damaged or cut short"):
            load(tmp_path / "cut", pruning=PRUNING)


@torch.no_grad()
def test_pruning_options_may_be_given_when_loading(official):
    folder, _ = official
    model = IVTPLlavaForConditionalGeneration.from_pretrained(folder, pruning=PRUNING | {"visual_tokens": 3})
    assert model.pruning_config.visual_tokens == 3


@torch.no_grad()
def test_our_folder_keeps_weights_options_and_official_names(tmp_path):
    model = tiny_model(relevance_threshold=0.1)
    model.save_pretrained(tmp_path)
    again, info = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.pruning_config == model.pruning_config
    inputs = prompt(ROWS)
    assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)
    names = set(load_file(tmp_path / "model.safetensors"))
    twin_names = tmp_path / "stock"
    stock_twin(model).save_pretrained(twin_names)
    assert set(load_file(twin_names / "model.safetensors")) < names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtype_and_device_map_reach_every_part(tmp_path, dtype):
    tiny_model().save_pretrained(tmp_path)
    model = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype, device_map="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.generate(**prompt(ROWS[:1]), max_new_tokens=2, do_sample=False).shape == (1, 28)


@torch.no_grad()
def test_layers_on_different_devices_agree(tmp_path):
    """Disk offload sends every layer through accelerate's hooks, as several GPUs would."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    parts = ["clip_text_model", "visual_projection", "multi_modal_projector", "language_model.embed_tokens"]
    parts += ["language_model.norm", "language_model.rotary_emb", "vision_tower.embeddings"]
    parts += ["vision_tower.pre_layrnorm", "vision_tower.post_layernorm"]
    layers = [f"{tower}.layers.{n}" for tower in ("language_model", "vision_tower.encoder") for n in range(6)]
    device_map = {"lm_head": "cpu"} | {f"model.{part}": "cpu" for part in parts}
    device_map |= {f"model.{layer}": "disk" if number % 2 else "cpu" for number, layer in enumerate(layers)}
    spread = IVTPLlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    inputs = prompt(ROWS)
    torch.testing.assert_close(spread.eval()(**inputs).logits, model(**inputs).logits)


def test_layers_are_never_split_between_devices():
    model = tiny_model()
    assert {"LlamaDecoderLayer", "CLIPEncoderLayer"} <= set(model._no_split_modules)


@torch.no_grad()
def test_the_base_model_loads_alone(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    base, info = IVTPLlavaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    inputs = prompt(ROWS)
    expected = model.model(**inputs).last_hidden_state
    assert torch.equal(base.eval()(**inputs).last_hidden_state, expected)


@torch.no_grad()
def test_the_auto_classes_know_an_installed_package(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is IVTPLlavaConfig
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto.from_pretrained(tmp_path)) is IVTPLlavaForConditionalGeneration


STRANGER = """
import json
from PIL import Image
from transformers import (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
                          pipeline)
folder, copy, image = sys.argv[1:]
trust = dict(trust_remote_code=True)
assert AutoConfig.from_pretrained(folder, **trust).model_type == "ivtp_llava"
processor = AutoProcessor.from_pretrained(folder, **trust)
question = "USER: <image>\\nWhat colour is the cat? ASSISTANT:"
inputs = processor(images=Image.open(image), text=question, return_tensors="pt")
answers = []
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(folder, **trust).eval()
    answers.append(model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist())
assert model.model(**inputs).last_hidden_state.shape[1] == inputs["input_ids"].shape[1]
model.save_pretrained(copy)
processor.save_pretrained(copy)
again = AutoModelForImageTextToText.from_pretrained(copy, **trust).eval()
assert again.model.guide.processor(again) is not None
answers.append(again.generate(**AutoProcessor.from_pretrained(copy, **trust)(
    images=Image.open(image), text=question, return_tensors="pt"),
    max_new_tokens=6, do_sample=False)[0].tolist())
pipe = pipeline("image-text-to-text", model=folder, **trust)
text = pipe(images=Image.open(image), text=question, max_new_tokens=6,
            do_sample=False)
print(json.dumps({"answers": answers, "piped": text[0]["generated_text"], "class": type(model).__module__}))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A complete folder with processor, and a picture."""
    folder = tmp_path_factory.mktemp("shared")
    processor = make_processor(size=56)
    model = model_for(processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    image = folder.parent / "cat.png"
    from PIL import Image

    Image.effect_mandelbrot((80, 60), (-2, -1.5, 1, 1.5), 40).convert("RGB").save(image)
    return folder, image


@pytest.mark.slow
def test_a_stranger_without_the_package_loads_generates_saves_and_loads_again(shared, tmp_path):
    folder, image = shared
    printed = stranger.run(STRANGER, folder, tmp_path / "copy", image, home=tmp_path)
    told = json.loads(printed.splitlines()[-1])
    assert told["class"].startswith("transformers_modules")
    from PIL import Image

    processor = AutoProcessor.from_pretrained(folder)
    question = "USER: <image>\nWhat colour is the cat? ASSISTANT:"
    inputs = processor(images=Image.open(image), text=question, return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    here = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist()
    assert told["answers"] == [here] * 4
    pipe = pipeline("image-text-to-text", model=str(folder))
    piped = pipe(images=Image.open(image), text=question, max_new_tokens=6, do_sample=False)
    assert piped[0]["generated_text"] == told["piped"]
    assert told["piped"].endswith(processor.decode(here[inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.slow
def test_a_pipeline_answers_batches_of_pictures_and_mixed_rows_singly(shared):
    from PIL import Image

    folder, image = shared
    pipe = pipeline("image-text-to-text", model=str(folder))
    short, long, blind = (
        [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
        for pictures, text in (
            ([{"type": "image", "image": Image.open(image)}], "the cat"),
            ([{"type": "image", "image": Image.open(image)}], "what colour is the cat beside the dog"),
            ([], "a cat"),
        )
    )

    def answers(rows, **options):
        made = pipe(rows, max_new_tokens=4, do_sample=False, **options)
        return [answer[0]["generated_text"][-1]["content"] for answer in made]

    assert answers([short, long], batch_size=2) == answers([short]) + answers([long])
    assert answers([short, blind], batch_size=1) == answers([short]) + answers([blind])
    # transformers refuses such a batch of stock LLaVA, too.
    with pytest.raises(ValueError, match="different keys"):
        answers([short, blind], batch_size=2)


def test_the_saved_configuration_names_every_auto_class(shared):
    folder, _ = shared
    config = json.loads((Path(folder) / "config.json").read_text())
    assert set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
    }
    for reference in config["auto_map"].values():
        assert (Path(folder) / f"{reference.split('.')[0]}.py").is_file()


@pytest.mark.slow
def test_a_folder_that_leaves_the_installed_package_still_carries_its_code(shared, tmp_path):
    folder, _ = shared
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_ivtp.py").is_file()
    assert (tmp_path / "language_ivtp.py").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("cls", [IVTPLlavaForConditionalGeneration, IVTPLlavaModel])
def test_the_weights_of_a_saved_folder_load_as_a_state_dict(cls, official, tmp_path):
    # Trainer resumes a run so; names that a model does not know it would leave out.
    official[1].save_pretrained(tmp_path, max_shard_size="40KB")
    config = IVTPLlavaConfig.from_pretrained(tmp_path)
    model, weights = cls(config), {}
    for shard in tmp_path.glob("*.safetensors"):
        weights |= load_file(shard)
    expected = cls.from_pretrained(tmp_path).state_dict()
    if cls is IVTPLlavaForConditionalGeneration:
        assert model.load_state_dict(weights).missing_keys == []
    else:
        assert model.load_state_dict(weights, strict=False).unexpected_keys == ["language_model.lm_head.weight"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    load_sharded_checkpoint(again := cls(config), tmp_path, strict=False)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    again.load_state_dict(expected)
