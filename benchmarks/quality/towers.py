"""Towers that stage 1 trained, in one file in half precision, from which the later stages go on on another machine.

Weights have the names that they have in a checkpoint.

    python -m benchmarks.quality.towers --clip out/miniature-plain-0/clip --out plain-0.safetensors
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.quality import command
from benchmarks.quality.loop import saved_settings, saved_weights, state_in
from benchmarks.quality.recipes import recipe_named
from benchmarks.quality.train_clip import Teacher

WORDS = "text_model.embeddings.token_embedding.weight"
NAMES = {
    "vision_model.": "vision_tower.vision_model.",
    "text_model.": "clip_text_model.text_model.",
    "text_projection.": "clip_text_model.text_projection.",
    "visual_projection.": "visual_projection.",
}
"""Beginnings of the names of CLIP's parts, and theirs in a checkpoint."""


def load_teacher(source: Path) -> Teacher:
    """Load the towers that stage 1 trained, without what its heads learned.

    Parameters
    ----------
    source : Path
        The folder of stage 1, or the file that `write_towers` made of it.

    Raises
    ------
    FileNotFoundError
        If there is neither.
    """
    if source.is_file():
        with safe_open(source, framework="pt") as file:
            recipe = file.metadata()["recipe"]
            weights = {_renamed(name, back=True): file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    else:
        recipe, weights = saved_settings(source)["recipe"], saved_weights(source, "clip.")
    teacher = Teacher(recipe_named(recipe))
    found = teacher.clip.load_state_dict(weights, strict=False)
    # A file holds what answers need; the temperature of CLIP's loss is not among it.
    if found.unexpected_keys or set(found.missing_keys) - {"logit_scale"}:
        raise ValueError(f"{source} holds other towers: {[*found.unexpected_keys, *found.missing_keys][:3]}")
    return teacher.eval().requires_grad_(False)


def write_towers(clip: Path, out: Path) -> None:
    """Write the towers of a folder of stage 1 into a file.

    Most of CLIP's vocabulary never occurs in the world's texts. Its rows of the embedding are still the random numbers
    of the beginning; here they become zeros, which Git and archives store in next to no space.
    """
    settings, weights = saved_settings(clip), saved_weights(clip, "clip.")
    embedding = weights[WORDS]
    embedding[~_trained_rows(clip, tuple(embedding.shape))] = 0.0
    renamed = {
        _renamed(name): value.to(torch.float16).contiguous() for name, value in weights.items() if name != "logit_scale"
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(renamed, out, {"format": "pt", "recipe": settings["recipe"], "seed": str(settings["seed"])})


def _trained_rows(clip: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Return which rows of the words' embedding ever had a gradient, by what its optimizer remembers."""
    with safe_open(state_in(clip), framework="pt") as state:
        names = [name for name in state.keys() if name.endswith("exp_avg_sq")]  # noqa: SIM118
        (squares,) = (name for name in names if tuple(state.get_slice(name).get_shape()) == shape)
        return state.get_tensor(squares).ne(0).any(1)


def _renamed(name: str, back: bool = False) -> str:
    for ours, theirs in NAMES.items():
        before, after = (theirs, ours) if back else (ours, theirs)
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def main(
    clip: Annotated[Path, typer.Option(help="Folder of stage 1.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
) -> None:
    """Write the towers."""
    write_towers(clip, out)
    print(f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    command.run(main)
