"""Assembly of a checkpoint that anyone can load from the states of training.

python -m benchmarks.quality.assemble --clip out/miniature/clip --llava out/miniature/llava --out out/miniature/model
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.quality import command
from benchmarks.quality.loop import saved_settings, saved_weights
from benchmarks.quality.miniature import clip_text_config, decoder_config, vision_config
from benchmarks.quality.recipes import recipe_named
from benchmarks.quality.speaker import Speaker
from benchmarks.quality.tokenizer import decoder_tokenizer, processor
from benchmarks.quality.towers import load_teacher
from benchmarks.quality.train_clip import Teacher
from benchmarks.quality.world import fingerprint
from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration
from modeling_ivtp.files.folder import new_folder


def assemble(teacher: Teacher, speaker: Speaker) -> IVTPLlavaForConditionalGeneration:
    """Build one IVTP-LLaVA of both stages; the features' normalisation becomes part of the projector.

    Raises
    ------
    ValueError
        If the stages were trained by different recipes.
    """
    recipe = teacher.recipe
    if speaker.recipe.name != recipe.name:
        raise ValueError(f"The towers were trained by recipe={recipe.name!r}, the decoder by {speaker.recipe.name!r}.")
    tokenizer = decoder_tokenizer()
    config = IVTPLlavaConfig(
        vision_config=vision_config(recipe).to_dict(),
        text_config=decoder_config(recipe, len(tokenizer)).to_dict(),
        clip_text_config=clip_text_config().to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pruning=recipe.pruning,
        world_fingerprint=fingerprint(),
        training_recipe=recipe.name,
    )
    model = IVTPLlavaForConditionalGeneration(config).eval()
    body = model.model
    body.vision_tower.load_state_dict(teacher.clip.vision_model.state_dict())
    body.clip_text_model.text_model.load_state_dict(teacher.clip.text_model.state_dict())
    body.clip_text_model.text_projection.load_state_dict(teacher.clip.text_projection.state_dict())
    body.visual_projection.load_state_dict(teacher.clip.visual_projection.state_dict())
    body.language_model.load_state_dict(speaker.language.state_dict())
    model.lm_head.load_state_dict(speaker.head.state_dict())
    projector, first = body.multi_modal_projector, speaker.linear_1
    projector.linear_2.load_state_dict(speaker.linear_2.state_dict())
    with torch.no_grad():
        projector.linear_1.weight.copy_(first.weight / speaker.deviation)
        projector.linear_1.bias.copy_(first.bias - first.weight @ (speaker.mean / speaker.deviation))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def load_speaker(folder: Path) -> Speaker:
    """Load what stages 2 and 3 trained."""
    speaker = Speaker(recipe_named(saved_settings(folder)["recipe"]))
    speaker.load_state_dict(saved_weights(folder))
    return speaker.eval()


def leave_out_code(folder: Path) -> None:
    """Remove the code from a checkpoint, which then loads with this package alone: a copy would grow old unnoticed."""
    for file in folder.glob("*.py"):
        file.unlink()
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        if _remove(content, "auto_map"):
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _remove(content: Any, name: str) -> bool:
    """Remove an entry at any depth, and return whether there was one."""
    if not isinstance(content, dict):
        return False
    found = content.pop(name, None) is not None
    return any([found, *(_remove(value, name) for value in content.values())])


def main(
    clip: Annotated[Path, typer.Option(help="Folder of stage 1, or a file of its towers.")],
    llava: Annotated[Path, typer.Option(help="Folder of stages 2 and 3.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    code: Annotated[
        bool, typer.Option(help="Write the code beside the weights, so that it loads without this package.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Write the checkpoint with code and processor."""
    if dtype not in ("float16", "bfloat16", "float32"):
        raise typer.BadParameter(f"{dtype}; allowed: float16, bfloat16, float32")
    model = assemble(load_teacher(clip), load_speaker(llava)).to(getattr(torch, dtype))
    size = sum(parameter.nbytes for parameter in model.parameters())
    with new_folder(out, needed_bytes=size, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        processor().save_pretrained(folder)
        if not code:
            leave_out_code(folder)
    print(f"wrote {out}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    command.run(main)
