"""Stage 1: the CLIP of the miniature, both towers, on scenes and captions.

CLIP's loss brings CLS and words together. Because the world is drawn, there are labels besides: for every patch what it
shows (kind and tile colour, the object's size and the place of its middle), for CLS the kinds in the scene and where
things are. Both are trained at the top of every group, so that a patch knows early, and still knows once its neighbours
are dropped. The heads for these labels are dropped in the end. The first steps learn from the labels alone, on small
scenes of 168 pixels at random windows of the position table; words join with whole scenes.

    python -m benchmarks.quality.train_clip --out out/miniature/clip
"""

import os
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import nn
from transformers import CLIPConfig, CLIPModel

from benchmarks.quality import command, plain_attention
from benchmarks.quality.captions_for_clip import Texts, texts_of
from benchmarks.quality.loop import TrainingRun, cosine_rate, drawn_ahead, optimize, optimizers_of, set_up
from benchmarks.quality.miniature import LAYERS, PROJECTION, WIDTH, clip_text_config, vision_config
from benchmarks.quality.world import COLOURS, GRID, PATCH, SIDE, SIZES, Scene, draw_scene, kinds

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PATCH_LABELS = {
    "kind": len(kinds()) + 1,
    "colour": len(COLOURS) + 1,
    "row": GRID,
    "column": GRID,
    "size": len(SIZES) + 1,
}
"""Labels of every patch, each with its number of values."""
PATCHES_WEIGHT, CLS_WEIGHT, WORDS_WEIGHT = 3.0, 0.1, 0.1
CELLS = 6
"""Cells on a side of the whole grid; CLS predicts how much of each is covered."""
SMALL_BATCH, BATCH, TEXTS = 64, 24, 3
"""Small scenes of a step, whole scenes of a step, and texts about each whole scene."""


class Teacher(nn.Module):
    """The CLIP in training, with heads for labels that are dropped in the end."""

    def __init__(self) -> None:
        super().__init__()
        text, vision = clip_text_config(), vision_config()
        self.clip = CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=PROJECTION)
        )
        if not torch.cuda.is_available():
            self.clip.set_attn_implementation(plain_attention.NAME)
        self.bias = nn.Parameter(torch.tensor(-6.0))
        nn.init.constant_(self.clip.logit_scale, 2.3)
        self.patch_heads = nn.ModuleList(_head(sum(PATCH_LABELS.values())) for _ in range(LAYERS // 2))
        self.cls_heads = nn.ModuleList(_head(len(kinds()) + CELLS**2) for _ in range(LAYERS // 2))
        for _, last in self.cls_heads:
            nn.init.constant_(last.bias, -4.0)  # most kinds are not in a scene

    def see(self, pixels: torch.Tensor, window: tuple[int, int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the states of CLS and patches at the top of each group, and the patches where LLaVA reads them.

        `window` is the row and column of the first patch in the whole grid.
        """
        tower = self.clip.vision_model
        patches = tower.embeddings.patch_embedding(pixels)
        side = patches.shape[-1]
        rows, columns = (torch.arange(start, start + side, device=pixels.device) for start in window)
        positions = 1 + (rows[:, None] * GRID + columns).flatten()
        patches = patches.flatten(2).transpose(1, 2) + tower.embeddings.position_embedding(positions)
        cls = tower.embeddings.class_embedding + tower.embeddings.position_embedding(positions.new_zeros(1))
        hidden = tower.pre_layrnorm(torch.cat([cls.expand(len(patches), 1, -1), patches], 1))
        tops, features = [], hidden
        for index, layer in enumerate(tower.encoder.layers):
            hidden = layer(hidden, None)
            if index == LAYERS - 2:
                features = hidden
            if index % 2:
                tops.append(hidden)
        return tops, features[:, 1:]

    def losses(self, batch: "Batch", device: torch.device) -> dict[str, torch.Tensor]:
        """Compute everything that is minimised, and shares of right answers to watch."""
        tops, features = self.see(batch.pixels.to(device), batch.window)
        present = batch.present.to(device)
        cls = [top[:, 0] for top in tops]
        losses = self._of_patches([*(top[:, 1:] for top in tops[:-1]), features], batch.labels)
        losses |= self._of_cls(cls, present, batch.covered.to(device))
        loss = PATCHES_WEIGHT * (losses["dense"] + losses["early"]) + CLS_WEIGHT * losses["cls"]
        if batch.texts is not None:
            losses |= self._of_words(cls[-1], present, batch.texts)
            loss = loss + WORDS_WEIGHT * losses["contrast"]
        return {"loss": loss} | losses

    def _of_patches(self, depths: list[torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compare patches with their labels, at the tops of the groups and, last, where LLaVA reads them."""
        wanted = labels.to(depths[0].device).flatten(0, 2).unbind(-1)
        objects = wanted[0] < len(kinds())
        weight = torch.where(objects, 1.0, 0.2)
        losses, right = [], {}
        for depth, (head, patches) in enumerate(zip(self.patch_heads, depths, strict=True), 1):
            if depth > 1:
                right[f"kind_{depth - 1}"] = right["kind"]
            predictions = head(patches.float()).flatten(0, 1).split(list(PATCH_LABELS.values()), -1)
            loss = torch.zeros((), device=patches.device)
            for name, logits, label in zip(PATCH_LABELS, predictions, wanted, strict=True):
                share = 1.0 if name == "kind" else 0.3
                loss = loss + share * (F.cross_entropy(logits, label, reduction="none") * weight).mean()
                right[name] = (logits.argmax(-1) == label)[objects].float().mean()
            losses.append(loss)
        return {"dense": losses[-1], "early": torch.stack(losses[:-1]).mean()} | right

    def _of_cls(self, cls: list[torch.Tensor], present: torch.Tensor, covered: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compare CLS with the kinds in the scene and the cover of each cell, at the top of every group."""
        wanted = torch.cat([present.float(), covered.flatten(1)], 1)
        logits = [head(state.float()) for head, state in zip(self.cls_heads, cls, strict=True)]
        losses = [F.binary_cross_entropy_with_logits(of_top, wanted, reduction="none") for of_top in logits]
        guess = logits[-1][:, : present.shape[1]] > 0
        f1 = 2 * (guess & present).sum() / (guess.sum() + present.sum()).clamp(min=1)
        return {"cls": torch.stack([loss.sum(1).mean() for loss in losses]).mean(), "cls_f1": f1}

    def _of_words(self, cls: torch.Tensor, present: torch.Tensor, texts: Texts) -> dict[str, torch.Tensor]:
        """Compare every text with every picture.

        A text that names little fits several pictures, and one that names nothing fits none. So each pair is judged by
        itself, with the sigmoid loss that open_clip offers beside the contrastive one.
        """
        named = texts.names.to(cls.device)
        hidden = self.clip.text_model(input_ids=texts.input_ids.to(cls.device)).last_hidden_state
        words = self.clip.text_projection(hidden[torch.arange(len(hidden)), texts.ends.to(cls.device)])
        images = self.clip.visual_projection(self.clip.vision_model.post_layernorm(cls))
        logits = F.normalize(words.float(), dim=-1) @ F.normalize(images.float(), dim=-1).T
        logits = logits * self.clip.logit_scale.exp().clamp(max=100) + self.bias
        fits = named.any(1, keepdim=True) & ~(named[:, None] & ~present[None]).any(-1)
        contrast = -F.logsigmoid(torch.where(fits, logits, -logits)).sum(1).mean()
        names = named.any(1)
        own = fits.gather(1, logits.argmax(1, keepdim=True))[names].float().mean()
        return {"contrast": contrast, "texts": own, "quiet": (logits[~names] < 0).float().mean()}


def _head(size: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, size))


def pixel_values(scenes: list[Scene]) -> torch.Tensor:
    """Return the pixel values of scenes, as CLIP's image processor would without resizing: (B, 3, side, side)."""
    return pixel_values_of(np.stack([scene.pixels for scene in scenes]))


def pixel_values_of(pixels: np.ndarray) -> torch.Tensor:
    """Return the pixel values of pictures (B, side, side, 3) uint8."""
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def patch_labels(scene: Scene, window: tuple[int, int]) -> np.ndarray:
    """Return the labels of every patch, by the order of `PATCH_LABELS`: int64 (grid, grid, 5).

    The last kind, colour and size are those of the ground, whose row and column are the patch's own. Rows and columns
    are counted on the whole grid, of which the scene fills a window.
    """
    where = scene.patch_objects()
    own = np.indices(where.shape)
    rows, columns = (
        np.where(where < 0, here, np.array([getattr(thing, axis) // PATCH for thing in scene.objects])[where])
        for here, axis in zip(own, "yx", strict=True)
    )
    size = np.append([SIZES.index(thing.size) for thing in scene.objects], len(SIZES))[where]
    kind, colour = scene.patch_kinds(), scene.patch_colours()
    kind, colour = np.where(kind < 0, len(kinds()), kind), np.where(colour < 0, len(COLOURS), colour)
    return np.stack([kind, colour, rows + window[0], columns + window[1], size], -1).astype(np.int64)


class Batch:
    """The scenes of a step with their labels, and with texts about them if asked for, drawn from the step number."""

    def __init__(self, step: int, size: int, side: int, texts: int = 0) -> None:
        draw = np.random.Generator(np.random.PCG64([7, step]))
        scenes = [draw_scene("train", step * 64 + number, side=side) for number in range(size)]
        self.pixels = pixel_values(scenes)
        self.present = torch.zeros(size, len(kinds()), dtype=torch.bool)
        for row, scene in enumerate(scenes):
            self.present[row, [thing.kind for thing in scene.objects]] = True
        free = GRID - side // PATCH
        self.window = (int(draw.integers(free + 1)), int(draw.integers(free + 1)))
        self.labels = torch.from_numpy(np.stack([patch_labels(scene, self.window) for scene in scenes]))
        whole = torch.zeros(size, GRID, GRID)
        rows, columns = (slice(start, start + side // PATCH) for start in self.window)
        whole[:, rows, columns] = (self.labels[..., 0] < len(kinds())).float()
        self.covered = F.avg_pool2d(whole, GRID // CELLS)
        self.texts = texts_of(scenes * texts, draw) if texts else None


def main(
    out: Annotated[Path, typer.Option(help="Folder of state and log; an earlier run there is continued.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1800,
    small_steps: Annotated[int, typer.Option(help="How many of them, the first ones, run on small scenes.")] = 800,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = os.cpu_count() or 1,
) -> None:
    """Train, or continue training."""
    device = set_up(seed, threads)
    teacher = Teacher().to(device)
    optimizers = optimizers_of(teacher)
    run = TrainingRun(out, teacher, optimizers, {"steps": steps, "small_steps": small_steps, "seed": seed})

    def draw(step: int) -> Batch:
        return Batch(step, SMALL_BATCH, 168) if step < small_steps else Batch(step, BATCH, SIDE, TEXTS)

    batches = drawn_ahead(draw, run.step)

    def one_step(step: int) -> dict[str, float]:
        batch = next(batches)
        with torch.autocast(device.type, torch.bfloat16):
            losses = teacher.losses(batch, device)
        return optimize(teacher, optimizers, losses, cosine_rate(step, steps))

    run.train(steps, one_step, title="CLIP")


if __name__ == "__main__":
    command.run(main)
