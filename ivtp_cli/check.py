"""`ivtp check`: hold the project's claims against a real checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, DtypeOption, check_file

Question = Annotated[
    list[str] | None,
    typer.Option("--question", "-q", help="A question of your own to the --image in the same place; may be repeated."),
]
Picture = Annotated[
    list[str] | None, typer.Option("--image", "-i", help="File, http(s) address or data URL; may be repeated.")
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="One more method whose answers are compared with unpruned ones, such as fastv, or a trained one's folder; "
        "may be repeated.",
        show_default=False,
    ),
]


def check(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an IVTP-LLaVA, or of an official LLaVA.")],
    image: Picture = None,
    question: Question = None,
    method: Methods = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The report to write.")] = Path("ivtp-check.md"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer questions and runs.")] = False,
    name: Annotated[
        str,
        typer.Option(help="The checkpoint's name, for the report; MODEL itself is never in it.", show_default=False),
    ] = "",
    device: Annotated[
        str | None, typer.Option(help="One device, such as cpu or cuda:1; default: the first GPU.", show_default=False)
    ] = None,
    dtype: DtypeOption = "auto",
    debug: Debug = False,
) -> None:
    """Measure on your checkpoint what this project claims, and write a report that you can post.

    The report says of each claim whether your checkpoint supports it. It names neither your machine, your files nor
    your questions. Its place is the issue template "Results on real weights".
    """
    pictures, asked = image or [], question or []
    if len(pictures) != len(asked):
        raise ValueError(f"check got {len(pictures)} --image and {len(asked)} --question; give one of each together")
    if not all(text.strip() for text in asked):
        raise ValueError("a --question is empty")
    check_file(out)
    import torch

    from modeling_ivtp.evaluation import check as checking
    from modeling_ivtp.evaluation.arm import Arm
    from modeling_ivtp.files.images import load_image
    from modeling_ivtp.methods.names import UNPRUNED, current_name
    from modeling_ivtp.serving.answering import load_model, warn_if_unguided

    if UNPRUNED in map(current_name, method or []):
        raise ValueError(f"--method {UNPRUNED}: all methods are compared with the unpruned model; leave it out")
    for each in method or []:
        Arm(each)  # refuses an unknown one before the model is loaded
    own = [checking.Asked(load_image(path), text, private=True) for path, text in zip(pictures, asked, strict=True)]
    loaded, processor = load_model(
        model, device=device or ("cuda:0" if torch.cuda.is_available() else "cpu"), dtype=dtype
    )
    extent = checking.QUICK if quick else checking.Extent()
    witness = checking.Witness(loaded, processor, checking.questions(extent, own), extent, method or [])
    with witness.arm.applied(loaded):
        warn_if_unguided(loaded, processor)
    findings = []
    for finding in checking.check(witness, lambda what: print(f"{what} …", file=sys.stderr)):
        findings.append(finding)
        typer.echo(f"{finding.verdict}: {finding.claim} ({finding.measured})")
    for asked_here, words in zip(witness.asked, witness.key_words, strict=False):
        if asked_here.private:
            typer.echo(f"key words of {asked_here.question!r}: {', '.join(words) or '(none)'}")
    out.write_text(checking.report(witness, findings, name=name, quick=quick), encoding="utf-8")
    typer.echo(f"Written: {out}")
