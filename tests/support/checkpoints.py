"""Tiny checkpoints on disk, in the formats that LLaVA and CLIP are published in."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from open_clip.model import CLIP
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from modeling_ivtp.flops import load_shape
from tests.support.text_tokenizers import clip_tokenizer, processor

SIDE, PATCH, WIDTH, PROJECTION = 56, 14, 64, 24
# Fits the four layers of both towers here: 16 patches, 9 after the vision tower, 4 in the end.
PRUNING = {"visual_tokens": 4, "tower_tokens": 9, "layers_per_group": 2, "decoder_layers": 4}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 1,
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_act": "quick_gelu",
}


def official_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LLaVA's weights under the names that the checkpoints on the Hub have, which differ from the modules'."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("lm_head.", "language_model.lm_head.")
        name = name.replace("model.language_model.", "language_model.model.")
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
        renamed[name.removeprefix("model.")] = tensor.contiguous()
    return renamed


def llava_folder(
    folder: Path,
    *,
    decoder: str = "llama",
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    side: int = SIDE,
    tower_layers: int = 4,
    decoder_layers: int = 4,
) -> LlavaForConditionalGeneration:
    """An official-format LLaVA with its processor; returns the model."""
    stock = processor(size=side)
    vision = VISION | {"image_size": side, "num_hidden_layers": tower_layers}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": PROJECTION, **vision},
        text_config={
            "model_type": decoder,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": decoder_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(stock.tokenizer) + 5,
            **({"sliding_window": None} if decoder == "mistral" else {}),
        },
        image_token_index=stock.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // PATCH) ** 2,
        dtype=dtype,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    model = LlavaForConditionalGeneration(config).to(dtype).eval()
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(official_names(model.state_dict()), folder, max_shard_size=max_shard_size)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    config.save_pretrained(folder)
    LlavaProcessor(
        image_processor=stock.image_processor,
        tokenizer=stock.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=stock.chat_template,
    ).save_pretrained(folder)
    logging.set_verbosity(verbosity)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "max_length": 77}))
    return model


def clip_folder(folder: Path, llava: LlavaForConditionalGeneration | None = None, **vision: Any) -> CLIPModel:
    """A transformers CLIP, with the vision tower of `llava` if it is given."""
    torch.manual_seed(1)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=text | {"max_position_embeddings": 20}, vision_config=VISION | vision, projection_dim=PROJECTION
    )
    model = CLIPModel(config).eval()
    if llava is not None:
        model.vision_model.load_state_dict(llava.model.vision_tower.state_dict())
    model.save_pretrained(folder)
    return model


def open_clip_file(path: Path) -> CLIP:
    """A weights file of open_clip whose vision tower is as wide as LLaVA's here."""
    torch.manual_seed(2)
    model = CLIP(
        embed_dim=PROJECTION,
        vision_cfg={"image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "layers": 1},
        text_cfg={"context_length": 20, "width": 64, "heads": 1, "layers": 2},
        quick_gelu=True,
    ).eval()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return model


def sparse_llava(folder: Path, shape: str) -> None:
    """An official-format LLaVA of a published shape: true headers before holes in place of numbers."""
    shape_config = load_shape(shape)
    stock = llava_folder(folder, side=shape_config.vision_config.image_size)
    config = LlavaConfig(
        vision_config=shape_config.vision_config,
        text_config=shape_config.text_config,
        image_token_index=stock.config.image_token_id,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        _write_sparse(folder / "model.safetensors", LlavaForConditionalGeneration(config))


def sparse_clip(folder: Path, shape: str) -> None:
    """The CLIP that belongs to a LLaVA of a published shape, likewise without numbers."""
    shape_config = load_shape(shape)
    text, vision = shape_config.clip_text_config, shape_config.vision_config
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=text.projection_dim)
    config.architectures = ["CLIPModel"]
    config.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        _write_sparse(folder / "model.safetensors", CLIPModel(config))


def _write_sparse(path: Path, model: torch.nn.Module) -> None:
    header, offset = {}, 0
    for name, tensor in model.state_dict().items():
        end = offset + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)


def store_processor_as(folder: Path, layout: str) -> None:
    """Rewrite the processor of a LLaVA folder the way that an older transformers stored it.

    Parameters
    ----------
    folder : Path
        As `llava_folder` writes it.
    layout : {"preprocessor_config.json alone", "no num_additional_image_tokens", "strategy full"}
        The files of 2023, which hold the image processor and nothing of LLaVA's; those of late 2024, which hold two of
        the three numbers; a strategy that counts the CLS token, which the model leaves out.
    """
    file = folder / "processor_config.json"
    values = json.loads(file.read_text())
    if layout == "preprocessor_config.json alone":
        image_processor = values.pop("image_processor") | {"processor_class": "LlavaProcessor"}
        (folder / "preprocessor_config.json").write_text(json.dumps(image_processor))
        file.unlink()
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        return
    if layout == "no num_additional_image_tokens":
        del values["num_additional_image_tokens"]
    else:
        values["vision_feature_select_strategy"] = "full"
    file.write_text(json.dumps(values))
