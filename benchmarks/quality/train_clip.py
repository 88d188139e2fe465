"""Stage 1: the CLIP of the miniature, both towers, on scenes and captions.

CLIP's loss teaches CLS and words to meet. Because the world is drawn, every patch may be told besides what
it shows (kind and tile colour), and CLS which kinds there are, at the top of every group; those heads are dropped in
the end. First steps run on small scenes of 168 pixels under random windows of the position table, the rest on whole
ones.

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

from benchmarks.quality.captions_for_clip import Texts, texts_of
from benchmarks.quality.loop import Stopped, TrainingRun, cosine_rate, drawn_ahead, optimize, optimizers_of, set_up
from benchmarks.quality.miniature import LAYERS, PROJECTION, WIDTH, clip_text_config, vision_config
from benchmarks.quality.world import COLOURS, SIDE, Scene, draw_scene, kinds

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GRID = SIDE // 14


class Teacher(nn.Module):
    """The CLIP that is trained, and the heads that help and are dropped."""

    def __init__(self) -> None:
        super().__init__()
        text, vision = clip_text_config(), vision_config()
        self.clip = CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=PROJECTION)
        )
        self.bias = nn.Parameter(torch.tensor(-6.0))
        nn.init.constant_(self.clip.logit_scale, 2.3)
        self.patch_norm = nn.LayerNorm(WIDTH)
        self.patch_head = nn.Linear(WIDTH, len(kinds()) + 1 + len(COLOURS) + 1)
        self.cls_norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS // 2))
        self.cls_heads = nn.ModuleList(nn.Linear(WIDTH, len(kinds()) * (1 + len(COLOURS))) for _ in range(LAYERS // 2))
        for head in self.cls_heads:
            nn.init.constant_(head.bias, -4.0)  # most kinds are not there

    def see(self, pixels: torch.Tensor, window: tuple[int, int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """CLS at the top of each group, and patch features where LLaVA reads them; `window` is a corner of the grid."""
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
                tops.append(hidden[:, 0])
        return tops, features[:, 1:]

    def losses(self, batch: "Batch", device: torch.device) -> dict[str, torch.Tensor]:
        """Everything that is minimised, and shares of right answers to watch."""
        tops, features = self.see(batch.pixels.to(device), batch.window)
        texts = batch.texts
        hidden = self.clip.text_model(input_ids=texts.input_ids.to(device)).last_hidden_state
        words = self.clip.text_projection(hidden[torch.arange(len(hidden)), texts.ends.to(device)])
        images = self.clip.visual_projection(self.clip.vision_model.post_layernorm(tops[-1]))
        logits = F.normalize(words.float(), dim=-1) @ F.normalize(images.float(), dim=-1).T
        logits = logits * self.clip.logit_scale.exp().clamp(max=100) + self.bias
        there, named = batch.present.any(-1).to(device), texts.names.to(device)
        # A text that names little is true of several images and one that names nothing of none, so each pair is judged
        # by itself: the sigmoid loss that open_clip has beside the contrastive one.
        fits = named.any(1, keepdim=True) & ~(named[:, None] & ~there[None]).any(-1)
        contrast = -F.logsigmoid(torch.where(fits, logits, -logits)).sum(1).mean()
        told = self.patch_head(self.patch_norm(features.float())).flatten(0, 1)
        kind_logits, colour_logits = told.split([len(kinds()) + 1, len(COLOURS) + 1], -1)
        kind, colour = batch.kinds.to(device).flatten(), batch.colours.to(device).flatten()
        weight = torch.where(kind == len(kinds()), 0.2, 1.0)
        dense = (F.cross_entropy(kind_logits, kind, reduction="none") * weight).mean()
        dense = dense + 0.5 * (F.cross_entropy(colour_logits, colour, reduction="none") * weight).mean()
        wanted = torch.cat([batch.present.any(-1, keepdim=True), batch.present], -1).flatten(1).float().to(device)
        seen = [head(norm(top.float())) for head, norm, top in zip(self.cls_heads, self.cls_norms, tops, strict=True)]
        cls = sum(F.binary_cross_entropy_with_logits(one, wanted, reduction="none").sum(1).mean() for one in seen)
        with torch.no_grad():
            objects = kind < len(kinds())
            right = (kind_logits.argmax(-1) == kind)[objects].float().mean()
            right_colour = (colour_logits.argmax(-1) == colour)[objects].float().mean()
            guess = seen[-1].unflatten(1, (len(kinds()), -1))[..., 0] > 0
            f1 = 2 * (guess & there).sum() / (guess.sum() + there.sum()).clamp(min=1)
            says = named.any(1)
            own = fits.gather(1, logits.argmax(1, keepdim=True))[says].float().mean()
            quiet = (logits[~says] < 0).float().mean()
        return {
            "loss": contrast + dense + 0.05 * cls, "contrast": contrast, "dense": dense, "cls": cls, "kinds": right,
            "colours": right_colour, "cls_f1": f1, "texts": own, "quiet": quiet,
        }  # fmt: skip


def pixel_values(scenes: list[Scene]) -> torch.Tensor:
    """What CLIP's image processor makes of scenes that have the right size already: (B, 3, side, side)."""
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


class Batch:
    """Scenes of one step with their labels, drawn from the step number."""

    def __init__(self, step: int, size: int, side: int) -> None:
        draw = np.random.Generator(np.random.PCG64([7, step]))
        scenes = [draw_scene("train", step * 64 + number, side=side) for number in range(size)]
        self.pixels = pixel_values(scenes)
        kind = torch.from_numpy(np.stack([scene.patch_kinds() for scene in scenes])).long()
        colour = torch.from_numpy(np.stack([scene.patch_colours() for scene in scenes])).long()
        self.kinds = kind.masked_fill(kind < 0, len(kinds()))
        self.colours = colour.masked_fill(colour < 0, len(COLOURS))
        self.present = torch.zeros(size, len(kinds()), len(COLOURS), dtype=torch.bool)
        for row, scene in enumerate(scenes):
            for thing in scene.objects:
                self.present[row, thing.kind, thing.colour] = True
        free = GRID - side // 14
        self.window = (int(draw.integers(free + 1)), int(draw.integers(free + 1)))
        self.texts: Texts = texts_of(scenes, draw)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the state and log; an earlier run there goes on.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 6000,
    small_steps: Annotated[int, typer.Option(help="How many of them run on small scenes first.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = os.cpu_count() or 1,
) -> None:
    """Train, or go on training."""
    device = set_up(seed, threads)
    teacher = Teacher().to(device)
    optimizers = optimizers_of(teacher)
    run = TrainingRun(out, teacher, optimizers, {"steps": steps, "small_steps": small_steps, "seed": seed})

    def draw(step: int) -> Batch:
        return Batch(step, 64, 168) if step < small_steps else Batch(step, 24, SIDE)

    batches = drawn_ahead(draw, run.step)

    def one_step(step: int) -> dict[str, float]:
        batch = next(batches)
        with torch.autocast(device.type, torch.bfloat16):
            losses = teacher.losses(batch, device)
        return optimize(teacher, optimizers, losses, cosine_rate(step, steps))

    run.train(steps, one_step, title="CLIP")


if __name__ == "__main__":
    try:
        typer.run(main)
    except Stopped as stopped:
        raise SystemExit(str(stopped)) from None
