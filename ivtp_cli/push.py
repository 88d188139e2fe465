"""`ivtp push`: publish a folder on the Hub."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from .options import Debug
from .tables import file_table, show


def push(
    folder: Annotated[str, typer.Argument(help="Folder of an IVTP-LLaVA, as convert writes it, or of a pruner.")],
    repo_id: Annotated[str, typer.Argument(help="Where on the Hub: owner/name, or the name of one of your own.")],
    card: Annotated[
        str | None,
        typer.Option(
            help="Model card: a file, or one of hub_cards/ by name; by default that of the checkpoint's recipe.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Visibility of a new repository.", show_default="the account's default"
        ),
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="HF_TOKEN", help="By default the one of `hf auth login`.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to; created if it does not exist.", show_default="main")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload IVTP-LLaVA",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Prepare, check and show everything, and send nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Upload without asking.")] = False,
    debug: Debug = False,
) -> None:
    """Publish a checkpoint on the Hub, with code, card and endpoint handler, in one commit."""
    if not (dry_run or yes or sys.stdin.isatty()):
        raise ValueError("nobody is there to ask; give --yes to upload, or --dry-run to look")
    from modeling_ivtp.publish.push import push as publish

    def confirm(upload: Any) -> bool:
        _show_upload(upload)
        what = "the repository that is there" if upload.exists else "a new repository"
        return yes or typer.confirm(f"Upload to {what}, {upload.repo_id}?")

    done = publish(
        folder,
        repo_id,
        confirm=confirm,
        dry_run=dry_run,
        card=card,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )
    if dry_run:
        _show_upload(done)
        typer.echo(f"would upload to {done.repo_id}; nothing was sent")
    elif done.revision is None:
        typer.echo("nothing was sent")
    else:
        typer.echo(f"uploaded: {done.url}")
        pruner = done.repository.pruner
        call, more = ("trained.load", "") if pruner else ("from_pretrained", ", trust_remote_code=True")
        typer.echo(f'pinned: {call}("{done.repo_id}", revision="{done.revision}"{more})')


def _show_upload(upload: Any) -> None:
    from modeling_ivtp.files.sizes import human_bytes

    files = upload.repository.files
    table = file_table(files)
    for name in upload.removed:
        table.add_row(name, "removed there")
    table.add_row("all", human_bytes(sum(files.values())))
    show(table)
    if upload.replaced:
        typer.echo(f"replaced there: {', '.join(upload.replaced)}")
    typer.echo(f"card: {upload.repository.card}")
    if upload.repository.pruner:
        typer.echo("checked: the modules load")
    elif upload.answer is None:
        typer.echo("checked: weights and code fit; there is too little free memory here to load them")
    else:
        typer.echo(f"checked: a fresh process loads it and answers {upload.answer!r}")
    if upload.repository.left_out:
        typer.echo(f"stays here: {', '.join(upload.repository.left_out)}")
