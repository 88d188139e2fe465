"""Stage 1: the CLIP of the miniature, both towers, on scenes and captions.

CLIP's loss brings CLS and words together. Because the world is drawn, there are labels besides: for every patch what it
shows (kind and tile colour, the object's size and the place of its middle), for CLS the kinds in the scene and where
things are. A recipe says after which layers and for how long they are taught; their heads are dropped in the end. In
the recipe `taught` this is the top of every group, so that a patch knows early, and still knows once its neighbours are
dropped. In `plain` patches are taught only where LLaVA reads them and only at first, and CLS learns from captions
alone. The first steps run on small scenes of 168 pixels at random windows of the position table.

    python -m benchmarks.quality.train_clip --recipe plain --out out/miniature-plain-0/clip
"""

import os
from dataclasses import asdict
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
from benchmarks.quality.loop import (
    TrainingRun,
    drawn_ahead,
    optimize,
    optimizers_of,
    precision,
    set_up,
    trains_in_bfloat16,
)
from benchmarks.quality.miniature import PROJECTION, WIDTH, clip_text_config, vision_config
from benchmarks.quality.recipes import TAUGHT, Recipe, TowerCourse, recipe_named
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
PATCHES_WEIGHT, CLS_WEIGHT = 3.0, 0.1
CELLS = 6
"""Cells on a side of the whole grid; CLS predicts how much of each is covered."""
SMALL_BATCH, BATCH = 64, 24
"""Small scenes of a step, and whole ones."""


class Teacher(nn.Module):
    """The CLIP in training, with heads for labels that are dropped in the end."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        text, vision = clip_text_config(), vision_config(recipe)
        self.clip = CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=PROJECTION)
        )
        if trains_in_bfloat16() and not torch.cuda.is_available():
            self.clip.set_attn_implementation(plain_attention.NAME)
        self.bias = nn.Parameter(torch.tensor(-6.0))
        nn.init.constant_(self.clip.logit_scale, 2.3)
        self.patch_heads = nn.ModuleList(_head(sum(PATCH_LABELS.values())) for _ in recipe.tower.patches_after)
        self.cls_heads = nn.ModuleList(_head(len(kinds()) + CELLS**2) for _ in recipe.tower.cls_after)
        for _, last in self.cls_heads:
            nn.init.constant_(last.bias, -4.0)  # most kinds are not in a scene

    def see(self, pixels: torch.Tensor, window: tuple[int, int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the states of CLS and patches after each layer, and the patches where LLaVA reads them.

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
        states = []
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None)
            states.append(hidden)
        return states, states[self.recipe.feature_layer - 1][:, 1:]

    def losses(self, batch: "Batch", device: torch.device, *, teach_patches: bool = True) -> dict[str, torch.Tensor]:
        """Compute everything that is minimised, and shares of right answers to watch.

        Parameters
        ----------
        batch : Batch
        device : torch.device
        teach_patches : bool, default True
            Learn from the labels of patches. False: only watch what is left of it.
        """
        course = self.recipe.tower
        states, _ = self.see(batch.pixels.to(device), batch.window)
        present = batch.present.to(device)
        loss = torch.zeros((), device=device)
        with torch.set_grad_enabled(teach_patches and torch.is_grad_enabled()):
            losses = self._of_patches([states[after - 1][:, 1:] for after in course.patches_after], batch.labels)
        if teach_patches:
            loss = PATCHES_WEIGHT * (losses["dense"] + losses["early"])
        if course.cls_after:
            cls = [states[after - 1][:, 0] for after in course.cls_after]
            losses |= self._of_cls(cls, present, batch.covered.to(device))
            loss = loss + CLS_WEIGHT * losses["cls"]
        if batch.texts is not None:
            texts, images = self._embedded(batch.texts, states[-1][:, 0])
            losses |= (
                self._of_labelled(texts, images, present, batch.texts.names.to(device))
                if course.labelled_texts
                else self._of_captions(texts, images)
            )
            loss = loss + course.texts_weight * losses["contrast"]
        return {"loss": loss} | losses

    def _of_patches(self, depths: list[torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compare patches with their labels after some layers, the last of which is where LLaVA reads them."""
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
        early = torch.stack(losses[:-1]).mean() if losses[:-1] else torch.zeros_like(losses[-1])
        return {"dense": losses[-1], "early": early} | right

    def _of_cls(self, cls: list[torch.Tensor], present: torch.Tensor, covered: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compare CLS after some layers with the kinds in the scene and the cover of each cell."""
        wanted = torch.cat([present.float(), covered.flatten(1)], 1)
        logits = [head(state.float()) for head, state in zip(self.cls_heads, cls, strict=True)]
        losses = [F.binary_cross_entropy_with_logits(of_top, wanted, reduction="none") for of_top in logits]
        guess = logits[-1][:, : present.shape[1]] > 0
        f1 = 2 * (guess & present).sum() / (guess.sum() + present.sum()).clamp(min=1)
        return {"cls": torch.stack([loss.sum(1).mean() for loss in losses]).mean(), "cls_f1": f1}

    def _embedded(self, texts: Texts, cls: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the unit embeddings of texts and pictures in CLIP's common space: (texts, 128), (B, 128)."""
        hidden = self.clip.text_model(input_ids=texts.input_ids.to(cls.device)).last_hidden_state
        words = self.clip.text_projection(hidden[torch.arange(len(hidden)), texts.ends.to(cls.device)])
        images = self.clip.visual_projection(self.clip.vision_model.post_layernorm(cls))
        return F.normalize(words.float(), dim=-1), F.normalize(images.float(), dim=-1)

    def _scale(self) -> torch.Tensor:
        return self.clip.logit_scale.exp().clamp(max=100)

    def _of_captions(self, texts: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute CLIP's own loss: a text belongs to the picture it was written about, and a picture to its text.

        `texts` holds one text for every picture, then a second one for every picture, and so on.
        """
        logits = texts @ images.T * self._scale()
        own = torch.arange(len(images), device=images.device)
        by_draw = logits.unflatten(0, (-1, len(images)))
        of_texts = F.cross_entropy(logits, own.repeat(len(by_draw)))
        of_images = torch.stack([F.cross_entropy(draw.T, own) for draw in by_draw]).mean()
        right = (by_draw.argmax(2) == own).float().mean()
        return {"contrast": (of_texts + of_images) / 2, "texts": right}

    def _of_labelled(
        self, texts: torch.Tensor, images: torch.Tensor, present: torch.Tensor, named: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Compare every text with every picture.

        A text that names little fits several pictures, and one that names nothing fits none. So each pair is judged by
        itself, with the sigmoid loss that open_clip offers beside the contrastive one.
        """
        logits = texts @ images.T
        logits = logits * self._scale() + self.bias
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
    """The scenes of a step with their labels, drawn from the step number.

    Parameters
    ----------
    step : int
    size : int
        Number of scenes.
    side : int
        Their side in pixels.
    texts : int, default 0
        Number of texts about each scene.
    course : TowerCourse, optional
        Decides which texts these are; default: the one of `TAUGHT`.
    """

    def __init__(self, step: int, size: int, side: int, texts: int = 0, course: TowerCourse = TAUGHT.tower) -> None:
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
        shares = course.question_share, course.word_share
        self.texts = texts_of(scenes * texts, draw, *shares) if texts else None

    @classmethod
    def of(cls, course: TowerCourse, step: int) -> "Batch":
        """Draw the batch of a step of a course."""
        if course.draws_small(step):
            return cls(step, SMALL_BATCH, 168, course.small_texts, course)
        return cls(step, BATCH, SIDE, course.texts, course)


def main(
    out: Annotated[Path, typer.Option(help="Folder of state and log; an earlier run there is continued.")],
    recipe: Annotated[str, typer.Option(help="taught or plain; later stages follow it.")] = TAUGHT.name,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; default: the recipe's.")] = None,
    small_steps: Annotated[
        int | None, typer.Option(help="How many of them, the first ones, run on small scenes; default: the recipe's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = os.cpu_count() or 1,
) -> None:
    """Train, or continue training."""
    chosen = recipe_named(recipe).with_steps("tower", steps=steps, small_steps=small_steps)
    course = chosen.tower
    device = set_up(seed, threads)
    teacher = Teacher(chosen).to(device)
    optimizers = optimizers_of(teacher)
    run = TrainingRun(out, teacher, optimizers, {"recipe": chosen.name, "seed": seed} | asdict(course))
    batches = drawn_ahead(lambda step: Batch.of(course, step), run.step)

    def one_step(step: int) -> dict[str, float]:
        batch = next(batches)
        with precision(device):
            losses = teacher.losses(batch, device, teach_patches=course.teaches_patches(step))
        return optimize(teacher, optimizers, losses, course.rate(step))

    run.train(course.steps, one_step, title="CLIP")


if __name__ == "__main__":
    command.run(main)
