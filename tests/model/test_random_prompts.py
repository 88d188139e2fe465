"""The engine against reference mode on random prompts under random options: what no list of cases thinks of."""

import random

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.support.reference import decoder_reference
from tests.support.tiny import prompt, tiny_config, tiny_model


def random_rows(draw):
    rows = []
    for _ in range(draw.randint(1, 4)):
        row = [draw.randint(1, 9) for _ in range(draw.randint(1, 3))]
        for _ in range(draw.randint(0, 3)):
            row.insert(draw.randint(0, len(row)), "image")
        rows.append(row)
    if not any("image" in row for row in rows):
        rows[0].insert(0, "image")
    return rows


def random_options(draw):
    """Options that fit the tiny model; a draw that contradicts itself is drawn again."""
    while True:
        visual = draw.choice([1, 2, 4, 7, 12, 15])
        options = {
            "visual_tokens": visual,
            "tower_tokens": draw.choice([visual, min(16, visual + 3), 16]),
            "layers_per_group": draw.choice([None, 1, 2, 3]),
            "tower_layers": draw.choice([None, 0, 2, 3, 6]),
            "decoder_layers": draw.choice([0, 2, 3, 6]),
            "relevance_threshold": draw.choice([-1.0, 0.0, 0.2, 1.0]),
            "aggregation": draw.choice(["rollout", "rollout", "mean", "max", "multiply", "last"]),
            "guidance": draw.choice(["clip", "clip", "mean_text", "text_similarity", "visual_cls"]),
            "pseudo_cls": draw.choice(["propagate", "pool"]),
            "positions": draw.choice(["original", "compact"]),
            "importance": draw.choice(["own", "accumulated"]),
            "choice": draw.choice(["top", "diverse"]),
        }
        try:
            if tiny_config(**options).pruning_plan() is not None:
                return options
        except ValueError:
            continue


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
@torch.no_grad()
def test_a_random_prompt_agrees_with_reference_mode(seed):
    draw = random.Random(seed)
    rows, options = random_rows(draw), random_options(draw)
    model = tiny_model(
        draw.choice(["llama", "mistral", "qwen2"]), attention=draw.choice(["eager", "sdpa"]), seed=seed, **options
    )
    inputs = prompt(rows, seed=seed)
    batch, length = inputs["input_ids"].shape
    later = torch.randint(3, 120, (batch, 5), generator=torch.Generator().manual_seed(seed))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(later)], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    rest = {name: inputs[name] for name in ("pixel_values", "clip_input_ids", "clip_spans")}
    rest["clip_spans"] = torch.nn.functional.pad(rest["clip_spans"], (0, 0, 0, 5))
    expected = decoder_reference(model, torch.cat([inputs["input_ids"], later], 1), mask, **rest)
    alive = torch.from_numpy(np.asarray(expected.alive))
    static = draw.random() < 0.5
    cache = StaticCache(config=model.config.text_config, max_cache_len=length + 5) if static else DynamicCache()
    pieces = [model(**inputs, position_ids=places[:, :length], past_key_values=cache).logits]
    for start, stop in ((0, 1), (1, 4), (4, 5)):
        pieces.append(
            model(
                input_ids=later[:, start:stop],
                attention_mask=mask[:, : length + stop],
                position_ids=places[:, length + start : length + stop],
                past_key_values=cache,
            ).logits
        )
    difference = (torch.cat(pieces, 1) - expected.logits).abs()[alive].max()
    assert difference <= 2e-5, f"{float(difference):.2g} with {rows} and {options}"
