"""Traces to describe and to draw, without a model that makes them."""

from pathlib import Path

import torch

from modeling_ivtp.model.trace import GroupTrace, ImageTrace, PruningTrace, TokenTrace

COFFEE = Path(__file__).parents[2] / "examples/images/coffee.jpg"
QUESTION = ["▁How", "▁many", "▁clo", "cks", "▁are", "▁on", "▁the", "▁wall", "?"]


def spell(texts, key=(), relevance=0.25, start=40):
    """Tokens side by side, those at the places in `key` past the threshold."""
    return tuple(
        TokenTrace(start + place, 100 + place, text, relevance + 0.01 * place if place in key else 0.1, place in key)
        for place, text in enumerate(texts)
    )


def image_trace(grid=(24, 24), tower=(120, 8), decoder=(64, 4), tokens=None, reference="pseudo_cls", seed=0):
    """Groups that keep the most important patches of a smooth random field; a stage: its last count, its groups."""
    generator = torch.Generator().manual_seed(seed)
    candidates, groups = torch.arange(grid[0] * grid[1]), []
    for stage, (last, many) in (("tower", tower), ("decoder", decoder)):
        first = len(candidates)
        for group in range(1, many + 1):
            field = torch.randn((1, 1, 6, 6), generator=generator)
            field = torch.nn.functional.interpolate(field, grid, mode="bicubic", align_corners=False)
            importance = field.flatten().exp()[candidates]
            kept = candidates[importance.topk(round(first * (last / first) ** (group / many))).indices.sort().values]
            groups.append(
                GroupTrace(stage, (3 * group - 3, 3 * group - 1), candidates, importance / importance.sum(), kept)
            )
            candidates = kept
    tokens = spell(QUESTION, {0, 1, 2, 3, 7}) if tokens is None else tokens
    return ImageTrace(0, grid, tuple(groups), tokens, reference)


def pruning_trace(*images):
    layers = tuple([120] * 3 + [103] * 3 + [88] * 3 + [75] * 3 + [64] * 20)
    return PruningTrace(images or (image_trace(),), 12_300_000, 35_100_000, layers)
