"""From a checkpoint folder to a Hub page: lay out, check, show, and upload in one commit."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from .cards import GENERIC, card_images, card_names, sample
from .fresh_check import check_fresh
from .staging import Repository, stage

# Files of an earlier push that transformers would take for this one's; it looks only in the root. Code is not among
# them: what the new code does not import is never read, and may be a person's own script.
_STALE = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "adapter_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class Push:
    """An upload, before or after it happens.

    Attributes
    ----------
    repo_id : str
    repository : Repository
    removed, replaced : tuple of str
        Files on the Hub that the upload deletes, and those that it writes anew.
    answer : str or None
        Answer of a fresh process; None if the weights did not fit into memory and were only checked against the code,
        or if the folder holds a trained pruner.
    exists : bool or None
        Whether the repository exists on the Hub already; None after a dry run, which does not ask.
    revision : str or None
        The commit; None before the upload.
    url : str or None
        Address of the commit, or of the pull request.
    """

    repo_id: str
    repository: Repository
    removed: tuple[str, ...]
    replaced: tuple[str, ...]
    answer: str | None
    exists: bool | None
    revision: str | None = None
    url: str | None = None


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    confirm: Callable[[Push], bool],
    dry_run: bool = False,
    card: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload IVTP-LLaVA",
    progress: bool = True,
) -> Push:
    """Publish a checkpoint.

    Parameters
    ----------
    folder : str or path
        Of an IVTP-LLaVA, or of a trained pruner.
    repo_id : str
        `owner/name`, or `name` for one of your own.
    confirm : callable
        Called with the upload before it happens; False ends it. Not called in a dry run.
    dry_run : bool
        Lay out and check without the network, and send nothing.
    card : str, optional
        See `stage`.
    private : bool, optional
        Visibility of a new repository; default: the account's.
    token : str, optional
        Default: the one that `hf auth login` stored, or HF_TOKEN.
    revision : str, optional
        Branch to commit to; it is created if it does not exist. Default: main.
    create_pr : bool
        Open a pull request instead.
    commit_message : str
    progress : bool
        Show progress bars on standard error if that is a terminal.

    Returns
    -------
    Push

    Raises
    ------
    ValueError
        If the folder or an option is wrong, the repository on the Hub holds a pruner where a model is pushed or a model
        where a pruner is, or the check fails.
    OSError
        If the Hub refuses or cannot be reached. The Hub keeps files that arrived, and they are not sent again; the
        repository stays as it was.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is no name of a repository; allowed: owner/name ({_first_line(error)})"
        ) from error
    for name, value in {"commit_message": commit_message, "token": token, "revision": revision}.items():
        if value is not None and not value.strip():  # a variable of the shell that is not set
            raise ValueError(f"{name} is empty")
    api, state = HfApi(token=token), _HubState()
    if not dry_run:
        if not (token or get_token()):
            raise ValueError("there is no token to write with; run `hf auth login`, set HF_TOKEN, or pass one")
        with _hub(api, repo_id):
            if "/" not in repo_id:
                repo_id = f"{api.whoami()['name']}/{repo_id}"
            state = _hub_state(api, repo_id, revision)
        _check_place(repo_id, state, private, revision if create_pr else None)
    with tempfile.TemporaryDirectory(prefix="ivtp-push-") as temporary:
        repository = stage(folder, repo_id, Path(temporary), card=card, revision=revision or "main")
        if "config.json" in state.files:
            with _hub(api, repo_id):
                _check_kind(api, repo_id, state, repository)
        # No loader looks into a pruner's repository for anything but its two files.
        stale = [name for name in state.files if _is_stale(name)] if not repository.pruner else []
        removed = tuple(name for name in stale if name not in repository.files)
        # An existing repository's own .gitattributes lists its large files.
        sent = [name for name in repository.files if not (name == ".gitattributes" and name in state.files)]
        replaced = tuple(name for name in sent if name in state.files)
        answer = None if repository.pruner else _fresh_answer(repository)
        upload = Push(repo_id, repository, removed, replaced, answer, state.exists)
        if dry_run or not confirm(upload):
            return upload
        with _hub(api, repo_id), _bars(progress and sys.stderr.isatty()):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, repository.folder / name) for name in sent),
                    *(CommitOperationDelete(name) for name in removed),
                ],
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                # Fails if somebody else has committed in between.
                parent_commit=state.head,
            )
        return replace(upload, revision=commit.oid, url=commit.pr_url or commit.commit_url)


@dataclass(frozen=True)
class _HubState:
    """The repository on the Hub before the upload: whether it and the branch exist, its newest commit, its files."""

    exists: bool | None = None
    private: bool | None = None
    has_branch: bool = False
    head: str | None = None
    files: tuple[str, ...] = ()


def _hub_state(api: HfApi, repo_id: str, revision: str | None) -> _HubState:
    api.whoami()
    has_branch = True
    try:
        info = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        # A new branch begins as a copy of main.
        info, has_branch = api.model_info(repo_id), False
    except RepositoryNotFoundError:
        return _HubState(exists=False)
    return _HubState(True, info.private, has_branch, info.sha, tuple(file.rfilename for file in info.siblings or ()))


def _check_place(repo_id: str, state: _HubState, private: bool | None, proposed_to: str | None) -> None:
    """Refuse to publish what shall be private, and a pull request to the branch `proposed_to` if there is none."""
    if private and state.private is False:
        raise ValueError(
            f"{repo_id} is public, and `private` is for a new repository; make it private in its settings on the Hub, "
            "or leave the option out"
        )
    if proposed_to is not None and not state.has_branch:
        raise ValueError(f"{repo_id} has no branch {proposed_to} that a pull request could go to")


def _check_kind(api: HfApi, repo_id: str, state: _HubState, repository: Repository) -> None:
    """Refuse to replace a model by a pruner or a pruner by a model: their files have the same names."""
    with tempfile.TemporaryDirectory(prefix="ivtp-push-") as temporary:
        file = api.hf_hub_download(repo_id, "config.json", revision=state.head, local_dir=temporary)
        text = Path(file).read_bytes()
    try:
        holds_pruner = "pruner" in json.loads(text)
    except (ValueError, TypeError):
        holds_pruner = False  # as little as a person's own file of that name
    if holds_pruner != repository.pruner:
        there, here = ("a trained pruner", "a model") if holds_pruner else ("a model", "a trained pruner")
        raise ValueError(f"{repo_id} holds {there}, and {here} would replace it; allowed: a repository of its own")


def _is_stale(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _STALE)


def _fresh_answer(repository: Repository) -> str | None:
    """Return the answer of a fresh process about the card's own example, or the generic card's."""
    card = repository.card if repository.card in card_names() else GENERIC
    place, question = sample(card)
    answer = check_fresh(repository.folder, repository.weight_bytes, card_images(card)[place], question)
    return answer.get("generated_text")


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Show huggingface_hub's progress bars only if `shown`; by default it writes them to pipes and log files too."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _hub(api: HfApi, repo_id: str) -> Iterator[None]:
    """Turn the Hub's errors into OSErrors that say what they mean and what to do next."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise OSError("HF_HUB_OFFLINE is set; unset it to upload") from error
    except HfHubHTTPError as error:
        raise OSError(_refusal(error, repo_id)) from error
    except RuntimeError as error:
        # The upload of a large file wraps what stopped it.
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise OSError(_refusal(cause, repo_id)) from error
        if _is_network(cause):
            raise OSError(_unreachable(cause)) from error
        raise
    except Exception as error:
        if not _is_network(error):
            raise
        raise OSError(_unreachable(error)) from error


def _is_network(error: Any) -> bool:
    # huggingface_hub is built on httpx or, newer, on httpx2; their errors share names and no class.
    return isinstance(error, (ConnectionError, TimeoutError)) or any(
        base.__name__ == "TransportError" for base in type(error).__mro__
    )


def _unreachable(error: Any) -> str:
    return (
        f"the connection to {constants.ENDPOINT} failed ({_first_line(error)}); the repository there is as it was, or "
        "complete if only the last reply was lost. To go on, run the same command again: files that arrived whole are "
        "not sent twice"
    )


def _refusal(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code if error.response is not None else 0
    wait = error.response.headers.get("retry-after", "") if error.response is not None else ""
    reason = f" ({error.server_message})" if getattr(error, "server_message", None) else ""
    meaning = {
        401: "the Hub does not accept the token; run `hf auth login` with one that may write",
        403: f"the token may not write to {repo_id}; use one with write access to it",
        404: f"the Hub knows no {repo_id} that this token may write to",
        409: f"somebody else has changed {repo_id} in the meantime; look at it, then run the same command again",
        412: f"somebody else has changed {repo_id} in the meantime; look at it, then run the same command again",
        413: "a file is larger than the Hub takes; convert again with a smaller --max-shard-size",
        429: "the Hub asks to slow down; run the same command again in "
        f"{f'{wait} seconds' if wait.isdigit() else 'a few minutes'}",
    }.get(status)
    if meaning is None and status >= 500:
        meaning = f"the Hub has a fault of its own ({status}); run the same command again later"
    if meaning is None:
        message = f"the Hub refused ({status}): {reason.strip(' ()') or _first_line(error)}"
    else:
        message = meaning + reason
    kept = ". The repository there is as it was, and files that arrived whole are not sent twice"
    return message + ("" if status in (401, 403, 404) else kept)


def _first_line(error: Any) -> str:
    """Return the first line of an error that is not blank, without request numbers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return re.sub(r"\s*\(Request ID:[^)]*\)", "", lines[0])
