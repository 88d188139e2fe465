"""Stage 1: the CLIP of the miniature, both towers, on scenes and captions.

CLIP's loss teaches CLS and words to meet. Because the world is drawn, every patch may be told besides what it shows
(kind and tile colour, how large the object is and where its middle), and CLS which kinds there are and where things
are, both at the top of every group: what is known early is still known where its neighbours are gone. Those heads are
dropped in the end. First steps learn to see, from those labels alone, on small scenes of 168 pixels under random
windows of the position table; words join with whole scenes.

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
"""What every patch is told, and among how many."""
PATCHES_WEIGHT, CLS_WEIGHT, WORDS_WEIGHT = 3.0, 0.1, 0.1
CELLS = 6
"""Cells on a side of the whole grid in which CLS is to know how much is there."""
SMALL_BATCH, BATCH, TEXTS = 64, 24, 3
"""Small scenes and whole ones of a step, and texts about each whole one."""


class Teacher(nn.Module):
    """The CLIP that is trained, and the heads that help and are dropped."""

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
            nn.init.constant_(last.bias, -4.0)  # most kinds are not there

    def see(self, pixels: torch.Tensor, window: tuple[int, int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What CLS and patches are at the top of each group, and patches where LLaVA reads them.

        `window` is a corner of the grid.
        """
        tower = self.clip.vision_model
        patches = tower.embeddings.patch_embedding(pixels)
        side = patches.shape[-1]
        rows, columns = (torch.arange(start, start + side, device=pixels.device) for start in window)
        places = 1 + (rows[:, None] * GRID + columns).flatten()
        patches = patches.flatten(2).transpose(1, 2) + tower.embeddings.position_embedding(places)
        cls = tower.embeddings.class_embedding + tower.embeddings.position_embedding(places.new_zeros(1))
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
        """Everything that is minimised, and shares of right answers to watch."""
        tops, features = self.see(batch.pixels.to(device), batch.window)
        there = batch.present.to(device)
        cls = [top[:, 0] for top in tops]
        told = self._of_patches([*(top[:, 1:] for top in tops[:-1]), features], batch.labels)
        told |= self._of_cls(cls, there, batch.covered.to(device))
        loss = PATCHES_WEIGHT * (told["dense"] + told["early"]) + CLS_WEIGHT * told["cls"]
        if batch.texts is not None:
            told |= self._of_words(cls[-1], there, batch.texts)
            loss = loss + WORDS_WEIGHT * told["contrast"]
        return {"loss": loss} | told

    def _of_patches(self, depths: list[torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """What every patch shows, at the tops of the groups and, last, where LLaVA reads it."""
        wanted = labels.to(depths[0].device).flatten(0, 2).unbind(-1)
        objects = wanted[0] < len(kinds())
        weight = torch.where(objects, 1.0, 0.2)
        losses, right = [], {}
        for depth, (head, patches) in enumerate(zip(self.patch_heads, depths, strict=True), 1):
            if depth > 1:
                right[f"kind_{depth - 1}"] = right["kind"]
            told = head(patches.float()).flatten(0, 1).split(list(PATCH_LABELS.values()), -1)
            loss = torch.zeros((), device=patches.device)
            for name, logits, label in zip(PATCH_LABELS, told, wanted, strict=True):
                share = 1.0 if name == "kind" else 0.3
                loss = loss + share * (F.cross_entropy(logits, label, reduction="none") * weight).mean()
                right[name] = (logits.argmax(-1) == label)[objects].float().mean()
            losses.append(loss)
        return {"dense": losses[-1], "early": torch.stack(losses[:-1]).mean()} | right

    def _of_cls(self, cls: list[torch.Tensor], there: torch.Tensor, covered: torch.Tensor) -> dict[str, torch.Tensor]:
        """Which kinds there are and how much of each cell things cover, at the top of every group."""
        wanted = torch.cat([there.float(), covered.flatten(1)], 1)
        seen = [head(one.float()) for head, one in zip(self.cls_heads, cls, strict=True)]
        losses = [F.binary_cross_entropy_with_logits(one, wanted, reduction="none") for one in seen]
        guess = seen[-1][:, : there.shape[1]] > 0
        f1 = 2 * (guess & there).sum() / (guess.sum() + there.sum()).clamp(min=1)
        return {"cls": torch.stack([one.sum(1).mean() for one in losses]).mean(), "cls_f1": f1}

    def _of_words(self, cls: torch.Tensor, there: torch.Tensor, texts: Texts) -> dict[str, torch.Tensor]:
        """Which words fit which picture.

        A text that names little is true of several images and one that names nothing of none, so each pair is judged
        by itself: the sigmoid loss that open_clip has beside the contrastive one.
        """
        named = texts.names.to(cls.device)
        hidden = self.clip.text_model(input_ids=texts.input_ids.to(cls.device)).last_hidden_state
        words = self.clip.text_projection(hidden[torch.arange(len(hidden)), texts.ends.to(cls.device)])
        images = self.clip.visual_projection(self.clip.vision_model.post_layernorm(cls))
        logits = F.normalize(words.float(), dim=-1) @ F.normalize(images.float(), dim=-1).T
        logits = logits * self.clip.logit_scale.exp().clamp(max=100) + self.bias
        fits = named.any(1, keepdim=True) & ~(named[:, None] & ~there[None]).any(-1)
        contrast = -F.logsigmoid(torch.where(fits, logits, -logits)).sum(1).mean()
        says = named.any(1)
        own = fits.gather(1, logits.argmax(1, keepdim=True))[says].float().mean()
        return {"contrast": contrast, "texts": own, "quiet": (logits[~says] < 0).float().mean()}


def _head(size: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, size))


def pixel_values(scenes: list[Scene]) -> torch.Tensor:
    """What CLIP's image processor makes of scenes that have the right size already: (B, 3, side, side)."""
    return pixel_values_of(np.stack([scene.pixels for scene in scenes]))


def pixel_values_of(pixels: np.ndarray) -> torch.Tensor:
    """The same of pictures (B, side, side, 3) uint8."""
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def patch_labels(scene: Scene, window: tuple[int, int]) -> np.ndarray:
    """The labels of `PATCH_LABELS` for every patch, int64 (grid, grid, 5); the last of each sort is the ground's.

    The ground's place is the patch's own. Places are counted on the whole grid, of which the scene fills a window.
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
    """Scenes of one step with their labels, and texts about them or none, drawn from the step number."""

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
    out: Annotated[Path, typer.Option(help="Folder of the state and log; an earlier run there goes on.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1800,
    small_steps: Annotated[int, typer.Option(help="How many of them run on small scenes first.")] = 800,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = os.cpu_count() or 1,
) -> None:
    """Train, or go on training."""
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
