"""Ask a photograph a question, unpruned beside pruned, and draw what was kept: the commands a user would type.

Without `--model` it first builds a miniature LLaVA with random weights, so it runs anywhere; its answers mean nothing,
while tokens, memory and seconds are measured. Give it a real checkpoint for answers that mean something.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from untrained import write_checkpoints

from modeling_ivtp.cli import main as ivtp

IMAGES = Path(__file__).parent / "images"
NOTICE = """
No --model was given: this is a miniature LLaVA with LLaVA-1.5's geometry (336 pixels, 576 patches) and RANDOM weights.
What it answers and which patches it keeps mean nothing; tokens, KV cache and seconds are measured."""


def run(*command: str) -> None:
    """Show a command and run it."""
    print(f"\n$ ivtp {shlex.join(command)}", flush=True)
    if status := ivtp(list(command)):
        sys.exit(status)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the picture.")] = Path("out/demo"),
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; default: a miniature, random weights.")] = None,
    image: Annotated[str, typer.Option(help="A picture.")] = str(IMAGES / "coffee.jpg"),
    question: Annotated[str, typer.Option(help="What to ask it.")] = "What is on the table?",
    visual_tokens: Annotated[int, typer.Option(help="Visual tokens to keep of 576.")] = 64,
) -> None:
    """Run the demonstration."""
    out.mkdir(parents=True, exist_ok=True)
    if model is None:
        print(NOTICE)
        llava, clip = write_checkpoints(out / "source")
        model = str(out / "checkpoint")
        run("convert", str(llava), "--clip", str(clip), "--out", model, "--overwrite")
    asked = ("--model", model, "--image", image, "--prompt", question, "--visual-tokens", str(visual_tokens))
    run("generate", *asked, "--compare", "--max-new-tokens", "16")
    run("explain", *asked, "--out", str(out / "kept.png"))
    print(f"\nOpen {out / 'kept.png'}: what is left of the picture, stage by stage.")


if __name__ == "__main__":
    typer.run(main)
