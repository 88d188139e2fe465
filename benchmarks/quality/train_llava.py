"""Stages 2 and 3: the miniature's projector, then projector and decoder, with the tower frozen, as LLaVA is trained.

Stage 2 aligns the projector: a patch of a dog on a red tile is to land near the words "dog" and "red". Stage 3 asks:
every picture is read once and 32 questions about it are answered side by side, each seeing the picture and itself
alone. Questions about single objects come first, relations join later. No patch is ever dropped in training.

    python -m benchmarks.quality.train_llava --clip out/miniature/clip --out out/miniature/llava
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.quality.loop import Stopped, TrainingRun, cosine_rate, drawn_ahead, optimize, optimizers_of, set_up
from benchmarks.quality.miniature import decoder_config
from benchmarks.quality.tokenizer import decoder_tokenizer
from benchmarks.quality.train_clip import Teacher, pixel_values
from benchmarks.quality.world import COLOURS, TYPES, Scene, draw_scene, kinds, questions

SINGLE = ("existence", "colour", "corner", "larger", "count")


class Speaker(nn.Module):
    """Projector, decoder and head; the frozen tower's features come normalised."""

    def __init__(self, config: LlamaConfig, width: int) -> None:
        super().__init__()
        self.language = LlamaModel(config)
        self.linear_1 = nn.Linear(width, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(()))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Tower features (B, N, width) in the decoder's space."""
        return self.linear_2(F.gelu(self.linear_1((features - self.mean) / self.deviation)))

    def forward(self, features: torch.Tensor, lead: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Hidden states of the questions.

        Parameters
        ----------
        features : Tensor (B, N, width)
        lead : int64 Tensor (L,)
            What stands before every picture.
        asked : int64 Tensor (B, Q, T)
            What stands behind it, question by question, padded on the right.

        Returns
        -------
        Tensor (B, Q, T, d)
        """
        batch, number, length = asked.shape
        embed = self.language.embed_tokens
        picture = torch.cat([embed(lead).expand(batch, -1, -1), self.project(features)], 1)
        words = embed(asked).flatten(1, 2)
        read = picture.shape[1]
        places = torch.arange(read + length, device=asked.device)[None]
        cos, sin = self.language.rotary_emb(picture, places)
        own = torch.ones(length, length, dtype=torch.bool, device=asked.device).tril()
        visible = torch.cat([own.new_ones(length, read), own], 1)[None, None]
        for layer in self.language.layers:
            attention = layer.self_attn
            both = layer.input_layernorm(torch.cat([picture, words], 1))
            shape = (*both.shape[:-1], -1, attention.head_dim)
            query, key, value = (
                one(both).view(shape).transpose(1, 2) for one in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            first_query, first_key = apply_rotary_pos_emb(
                query[:, :, :read], key[:, :, :read], cos[:, :read], sin[:, :read]
            )
            first_value = value[:, :, :read]
            seen = F.scaled_dot_product_attention(first_query, first_key, first_value, is_causal=True)

            def by_question(states: torch.Tensor) -> torch.Tensor:
                states = states[:, :, read:].unflatten(2, (number, length))
                return states.transpose(1, 2).flatten(0, 1)

            later_query, later_key = apply_rotary_pos_emb(
                by_question(query), by_question(key), cos[:, read:], sin[:, read:]
            )
            keys = torch.cat([first_key.repeat_interleave(number, 0), later_key], 2)
            values = torch.cat([first_value.repeat_interleave(number, 0), by_question(value)], 2)
            heard = F.scaled_dot_product_attention(later_query, keys, values, attn_mask=visible)
            heard = heard.unflatten(0, (batch, number)).transpose(1, 2).flatten(2, 3)
            output = torch.cat([seen, heard], 2).transpose(1, 2).flatten(2)
            picture, words = (torch.cat([picture, words], 1) + attention.o_proj(output)).split(
                [read, words.shape[1]], 1
            )
            both = torch.cat([picture, words], 1)
            both = both + layer.mlp(layer.post_attention_layernorm(both))
            picture, words = both.split([read, words.shape[1]], 1)
        return self.language.norm(words).unflatten(1, (number, length))


@dataclass
class Asked:
    """Pictures of one step and their questions."""

    pixels: torch.Tensor
    lead: torch.Tensor
    tokens: torch.Tensor
    answers: torch.Tensor
    types: torch.Tensor
    words: torch.Tensor


def ask(step: int, size: int, number: int, types: tuple[str, ...]) -> Asked:
    """Draw the scenes of a step; another step never draws the same ones."""
    tokenizer = decoder_tokenizer()
    draw = np.random.Generator(np.random.PCG64([11, step]))
    scenes = [draw_scene("train", 1_000_000 + step * 64 + row) for row in range(size)]
    rows, sorts = [], []
    lead: list[int] = []
    for scene in scenes:
        asked = questions(scene, number, types=types, variant=int(draw.integers(1 << 30)))
        asked = [asked[index % len(asked)] for index in range(number)]
        encoded = tokenizer([f"{one.prompt} {one.answer}</s>" for one in asked])["input_ids"]
        image = encoded[0].index(tokenizer.convert_tokens_to_ids("<image>"))
        lead = encoded[0][:image]
        rows.append([ids[image + 1 :] for ids in encoded])
        sorts.append([TYPES.index(one.type) for one in asked])
    longest = max(len(ids) for row in rows for ids in row)
    tokens = torch.zeros(size, number, longest, dtype=torch.long)
    answers_at = torch.zeros(size, number, dtype=torch.long)
    for row, of_scene in enumerate(rows):
        for column, ids in enumerate(of_scene):
            tokens[row, column, : len(ids)] = torch.tensor(ids)
            answers_at[row, column] = len(ids) - 3  # the token that predicts the answer; then the answer, then the end
    return Asked(
        pixel_values(scenes), torch.tensor(lead), tokens, answers_at, torch.tensor(sorts), _patch_words(scenes)
    )


def _patch_words(scenes: list[Scene]) -> torch.Tensor:
    """The decoder's tokens for what each patch shows: (B, N, 2) kind and colour, -1 where there is nothing."""
    tokenizer = decoder_tokenizer()
    of_kind = torch.tensor([*(tokenizer(f" {kind.name}")["input_ids"][-1] for kind in kinds()), -1])
    of_colour = torch.tensor([*(tokenizer(f" {colour}")["input_ids"][-1] for colour in COLOURS), -1])
    seen = [(scene.patch_kinds().ravel(), scene.patch_colours().ravel()) for scene in scenes]
    return torch.stack(
        [torch.stack([of_kind[torch.from_numpy(k).long()], of_colour[torch.from_numpy(c).long()]], -1) for k, c in seen]
    )


def load_teacher(folder: Path) -> Teacher:
    """The tower that stage 1 trained."""
    file = folder / "state.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: train stage 1 first (benchmarks.quality.train_clip).")
    teacher = Teacher()
    with safe_open(file, framework="pt") as state:
        names = [name for name in state.keys() if name.startswith("weights.")]  # noqa: SIM118
        teacher.load_state_dict({name.removeprefix("weights."): state.get_tensor(name) for name in names})
    return teacher.eval().requires_grad_(False)


def main(
    clip: Annotated[Path, typer.Option(help="Folder of stage 1.")],
    out: Annotated[Path, typer.Option(help="Folder of the state and log; an earlier run there goes on.")],
    align_steps: Annotated[int, typer.Option(help="Steps of stage 2.")] = 300,
    single_steps: Annotated[int, typer.Option(help="Further steps with questions about single objects.")] = 2000,
    steps: Annotated[int, typer.Option(help="All steps.")] = 12000,
    number: Annotated[int, typer.Option(help="Questions about each picture.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = os.cpu_count() or 1,
) -> None:
    """Train, or go on training."""
    device = set_up(seed, threads)
    size = 32 if device.type == "cuda" else 8
    teacher = load_teacher(clip).to(device)
    speaker = Speaker(decoder_config(len(decoder_tokenizer())), teacher.clip.config.vision_config.hidden_size).to(
        device
    )

    @torch.no_grad()
    def see(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return teacher.see(pixels.to(device), (0, 0))[1].float()

    sample = see(pixel_values([draw_scene("train", index) for index in range(32)]))
    speaker.mean.copy_(sample.mean((0, 1)))
    speaker.deviation.copy_(sample.std())
    optimizers = optimizers_of(speaker)
    settings = {
        "align": align_steps,
        "single": single_steps,
        "steps": steps,
        "number": number,
        "seed": seed,
        "size": size,
    }
    run = TrainingRun(out, speaker, optimizers, settings)

    def draw(step: int) -> Asked:
        types = TYPES if step >= align_steps + single_steps else SINGLE
        return ask(step, size, number, tuple(one for one in TYPES if one in types))

    batches = drawn_ahead(draw, run.step)

    def one_step(step: int) -> dict[str, float]:
        batch = next(batches)
        features = see(batch.pixels)
        with torch.autocast(device.type, torch.bfloat16):
            told = _align(speaker, features, batch) if step < align_steps else _answer(speaker, features, batch)
        return optimize(speaker, optimizers, told, cosine_rate(step, steps))

    run.train(steps, one_step, title="LLaVA")


def _align(speaker: Speaker, features: torch.Tensor, batch: Asked) -> dict[str, torch.Tensor]:
    """Stage 2: what a patch shows, told by its nearest words."""
    logits = speaker.project(features).float() @ speaker.language.embed_tokens.weight.float().T
    wanted = batch.words.to(features.device)
    losses = [F.cross_entropy(logits.flatten(0, 1), wanted[..., one].flatten(), ignore_index=-1) for one in (0, 1)]
    return {"loss": losses[0] + losses[1], "kind": losses[0], "colour": losses[1]}


def _answer(speaker: Speaker, features: torch.Tensor, batch: Asked) -> dict[str, torch.Tensor]:
    """Stage 3: the answer and the end behind it."""
    device = features.device
    tokens, at = batch.tokens.to(device), batch.answers.to(device)
    hidden = speaker(features, batch.lead.to(device), tokens)
    places = torch.stack([at, at + 1], -1)
    taken = hidden.gather(2, places[..., None].expand(-1, -1, -1, hidden.shape[-1]))
    logits = speaker.head(taken).float()
    wanted = tokens.gather(2, places + 1)
    loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten())
    right = (logits[:, :, 0].argmax(-1) == wanted[..., 0]).float()
    told = {"loss": loss, "right": right.mean()}
    for index, name in enumerate(TYPES):
        if (of_type := batch.types.to(device) == index).any():
            told[name] = right[of_type].mean()
    return told


if __name__ == "__main__":
    try:
        typer.run(main)
    except Stopped as stopped:
        raise SystemExit(str(stopped)) from None
