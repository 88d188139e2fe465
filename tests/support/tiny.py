"""Tiny models and prompts that every test shares: random weights, large enough that attention is far from uniform."""

from typing import Any

import torch

from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration

IMAGE_TOKEN, PAD_TOKEN, VOCABULARY = 127, 0, 128
PATCHES, SIDE, CONTEXT = 16, 56, 12
PRUNING: dict[str, Any] = {"visual_tokens": 4, "tower_tokens": 9, "layers_per_group": 2, "decoder_layers": 4}


def tiny_config(
    decoder: str = "llama",
    clip: bool = True,
    width: int = 32,
    vocabulary: int = VOCABULARY,
    image_token: int = IMAGE_TOKEN,
    clip_vocabulary: int = 100,
    context: int = CONTEXT,
    connector: Any = None,
    **pruning: Any,
) -> IVTPLlavaConfig:
    """Images of 4x4 patches, six layers in each tower, pruning 16 -> 9 -> 4 unless `pruning` sets other counts."""
    clip_text = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": clip_vocabulary,
        "projection_dim": width // 2,
        "max_position_embeddings": context,
        "bos_token_id": clip_vocabulary - 2,
        "eos_token_id": clip_vocabulary - 1,
    }
    return IVTPLlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_attention_heads": 4,
            "num_hidden_layers": 6,
            "image_size": SIDE,
            "patch_size": 14,
            "projection_dim": width // 2,
        },
        text_config={
            "model_type": decoder,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 6,
            "vocab_size": vocabulary,
            "pad_token_id": PAD_TOKEN,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_position_embeddings": 512,
            **({"sliding_window": None} if decoder == "mistral" else {}),
        },
        clip_text_config=clip_text if clip else None,
        image_token_index=image_token,
        image_seq_length=PATCHES,
        pruning=PRUNING | ({"enabled": False} if connector else {}) | pruning,
        connector=connector,
    )


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough for peaked attention, small enough that logits stay near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                noise *= (32 / parameter.shape[1]) ** 0.5
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif "q_proj" in name or "k_proj" in name:
                parameter.copy_(0.3 * noise)
            elif "lm_head" in name:
                parameter.copy_(0.05 * noise)
            else:
                parameter.copy_(0.12 * noise)
    return model


def tiny_model(
    decoder: str = "llama", clip: bool = True, attention: str = "sdpa", seed: int = 0, **options: Any
) -> IVTPLlavaForConditionalGeneration:
    """A tiny IVTP-LLaVA in evaluation mode; `options` are those of `tiny_config`."""
    model = IVTPLlavaForConditionalGeneration._from_config(
        tiny_config(decoder, clip, **options), attn_implementation=attention
    )
    model.generation_config.pad_token_id = PAD_TOKEN
    model.generation_config.eos_token_id = None
    return randomize(model, seed).eval()


def model_for(processor: Any, **options: Any) -> IVTPLlavaForConditionalGeneration:
    """A tiny model that reads what a processor with CLIP's real vocabulary writes."""
    return tiny_model(
        vocabulary=len(processor.tokenizer),
        image_token=processor.image_token_id,
        clip_vocabulary=49408,
        context=77,
        **options,
    )


def prompt(rows: list[list[Any]], seed: int = 1, guided: bool = True, places: int = PATCHES) -> dict[str, torch.Tensor]:
    """A left-padded batch: each row is a list of text lengths and "image"s (of some `places`), e.g. [3, "image", 6].

    Text after the first image, or all text of a row without one, is the instruction; its tokens span one or two CLIP
    tokens each.
    """
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(3, 120, (length,), generator=generator).tolist()

    ids, asked = [], []
    for row in rows:
        tokens: list[int] = []
        instruction: list[bool] = []
        for part in row:
            seen = "image" not in row or IMAGE_TOKEN in tokens
            tokens += [IMAGE_TOKEN] * places if part == "image" else text(part)
            instruction += [False] * places if part == "image" else [seen] * part
        ids.append(tokens)
        asked.append(instruction)
    length = max(map(len, ids))
    inputs = {
        "input_ids": torch.tensor([[PAD_TOKEN] * (length - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    images = sum(row.count("image") for row in rows)
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    if guided:
        inputs |= _clip_inputs([[False] * (length - len(row)) + row for row in asked], generator)
    return inputs


def _clip_inputs(asked: list[list[bool]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    body, windows, spans = CONTEXT - 2, [], []
    for row in asked:
        clip_length, row_spans = 0, []
        for position, is_asked in enumerate(row):
            if not is_asked:
                row_spans.append((0, 0))
                continue
            width = min(1 + position % 2, body - clip_length % body)
            window, offset = divmod(clip_length, body)
            start = window * CONTEXT + 1 + offset
            row_spans.append((start, start + width))
            clip_length += width
        count = -(-clip_length // body)
        words = torch.randint(1, 98, (count, body), generator=generator)
        edge = torch.ones(count, 1, dtype=torch.long)
        windows.append(torch.cat([edge * 98, words, edge * 99], 1))
        spans.append([(a - count * CONTEXT, b - count * CONTEXT) if b else (0, 0) for a, b in row_spans])
    most = max(1, *(len(window) for window in windows))
    padded = [torch.cat([torch.zeros(most - len(w), CONTEXT, dtype=torch.long), w]) for w in windows]
    return {"clip_input_ids": torch.stack(padded), "clip_spans": torch.tensor(spans)}


def image_features(outputs: Any) -> torch.Tensor:
    """The features of all images in an output, one patch after the other (transformers 5.24 lists them by image)."""
    features = outputs.image_hidden_states
    return features.flatten(0, -2) if isinstance(features, torch.Tensor) else torch.cat(list(features))


def rows_alone(inputs: dict[str, torch.Tensor], rows: list[list[Any]]) -> list[dict[str, torch.Tensor]]:
    """The rows of a batch as prompts of their own, without padding."""
    alone, first = [], 0
    for index, row in enumerate(rows):
        length = int(inputs["attention_mask"][index].sum())
        single = {name: inputs[name][index : index + 1, -length:] for name in ("input_ids", "attention_mask")}
        count = row.count("image")
        if count:
            single["pixel_values"] = inputs["pixel_values"][first : first + count]
        first += count
        if "clip_spans" in inputs:
            single["clip_input_ids"] = inputs["clip_input_ids"][index : index + 1]
            single["clip_spans"] = inputs["clip_spans"][index : index + 1, -length:]
        alone.append(single)
    return alone
