"""Finding checkpoints: in a local folder, or in a repository on the Hugging Face Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_repo_discussions, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, RepositoryNotFoundError

from .weights import INDEX_FILE, SINGLE_FILE, WEIGHT_PATTERNS, Checkpoint, TensorInfo, dtype_named, no_safetensors

# Files that transformers reads beside the weights; each holds a JSON object.
_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


@dataclass(frozen=True)
class HubOptions:
    """The arguments every download takes; see `huggingface_hub.snapshot_download`."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    def check(self, repo: str, kind: str = "model") -> None:
        """Raise OSError at once if a repository is neither cached nor on the Hub, where a download would try again.

        Parameters
        ----------
        repo : str
        kind : {"model", "dataset"}
        """
        cache = None if self.cache_dir is None else Path(self.cache_dir)
        if self.local_files_only or try_to_load_from_cache(repo, "config.json", cache, self.revision) is not None:
            return
        here, there = ("folder", "repository") if kind == "model" else ("file or folder", "data set")
        try:
            HfApi(token=self.token).repo_info(repo, repo_type=kind, revision=self.revision, timeout=10)
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{repo} is neither a {here} here nor a {there} on the Hugging Face Hub that you may read"
            ) from error
        except HfHubHTTPError:
            return  # the download says what is wrong
        except Exception as error:
            raise OSError(f"{repo} is no {here} here, and the Hugging Face Hub cannot be reached: {error}") from error

    def snapshot(self, repo: str, patterns: Iterable[str], revision: str | None = None) -> Path:
        """Download the files of a Hub repository that match `patterns`, and return their local folder."""
        self.check(repo)
        return Path(
            snapshot_download(
                repo,
                revision=revision or self.revision,
                token=self.token,
                cache_dir=None if self.cache_dir is None else Path(self.cache_dir),
                local_files_only=self.local_files_only,
                allow_patterns=list(patterns),
            )
        )


def is_hub_id(source: str) -> bool:
    """Return whether `source`, which is no local path, can name a Hub repository (`name` or `owner/name`)."""
    parts = source.split("/")
    return len(parts) <= 2 and all(part and part[0] not in ".~" and not set(part) & set("\\: ") for part in parts)


def local_folder(source: str | os.PathLike[str]) -> Path | None:
    """Return `source` as a folder, or None if it names a Hub repository.

    Raises
    ------
    OSError
        If it is neither.
    ValueError
        If it is empty.
    """
    if not os.fspath(source):  # a variable of the shell that is not set; as a path it would be the current folder
        raise ValueError("the checkpoint has no name; give a folder, or a name on the Hugging Face Hub")
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{source} is a file; give the folder that holds config.json and the weights")
    if isinstance(source, str) and is_hub_id(source):
        return None
    raise FileNotFoundError(f"{source} is neither a folder here nor the name of a repository on the Hugging Face Hub")


@contextmanager
def naming_damaged_file(source: object, folder: Path | None) -> Iterator[None]:
    """Name the damaged file where a library raises an error that does not, such as a KeyError.

    Parameters
    ----------
    source : object
        The name or path that the user gave.
    folder : Path or None
        The local folder of its small files, among which the damaged one is searched.

    Raises
    ------
    ValueError
        In place of an error that names no file.
    """
    try:
        yield
    except Exception as error:
        speaks_for_itself = isinstance(error, (OSError, ValueError, ImportError, RuntimeError, MemoryError))
        if speaks_for_itself and not isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
            raise
        folders = () if folder is None else (folder, folder / "clip_tokenizer")
        files = (parent / name for parent in folders for name in _JSON_FILES)
        damaged = next((file for file in files if file.is_file() and not _holds_object(file)), None)
        fault = f"{source} cannot be read" if damaged is None else f"{damaged} is damaged: it holds no JSON object"
        raise ValueError(f"{fault} ({type(error).__name__}: {error})") from error


def _holds_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def open_checkpoint(
    source: str | os.PathLike[str], options: HubOptions, *, headers_only: bool = False, extra: Iterable[str] = ()
) -> tuple[Checkpoint, Path]:
    """Open the weights of a local folder or Hub repository.

    Parameters
    ----------
    source : str or path
        A folder, or a repository's name on the Hub.
    options : HubOptions
        Options of the download.
    headers_only : bool
        Of a Hub repository download the weights' headers alone; the weights cannot be read then.
    extra : iterable of str
        Patterns of the files to download beside the weights.

    Returns
    -------
    checkpoint : Checkpoint
    folder : Path
        The folder that holds its small files.
    """
    folder = local_folder(source)
    if folder is not None:
        return Checkpoint.from_folder(folder, str(source)), folder
    repo = str(source)
    options.check(repo)
    if headers_only and not options.local_files_only:
        return hub_headers(repo, options), options.snapshot(repo, extra)
    folder = options.snapshot(repo, (*WEIGHT_PATTERNS, *extra))
    weights = folder
    if not (folder / SINGLE_FILE).is_file() and not (folder / INDEX_FILE).is_file() and not options.local_files_only:
        revision = converted_revision(repo, options)
        if revision is None:
            names = HfApi(token=options.token).list_repo_files(repo, revision=options.revision)
            raise ValueError(no_safetensors(repo, names))
        weights = options.snapshot(repo, WEIGHT_PATTERNS, revision)
    return Checkpoint.from_folder(weights, repo), folder


def converted_revision(repo: str, options: HubOptions) -> str | None:
    """Find the pull request in which the Hub's own bot offers a repository's weights as safetensors: `refs/pr/N`.

    Older repositories, such as `openai/clip-vit-large-patch14-336`, have none on their main branch. transformers reads
    the same pull request.
    """
    if options.revision not in (None, "main"):
        return None
    requests = get_repo_discussions(
        repo,
        author="SFconvertbot",
        discussion_type="pull_request",
        discussion_status="open",
        token=options.token,
    )
    return next((request.git_reference for request in requests), None)


def hub_headers(repo: str, options: HubOptions, *, file: str | None = None) -> Checkpoint:
    """Download the headers of a Hub repository's weights, or of one of its files.

    Raises
    ------
    ValueError
        If the repository has no safetensors weights.
    """
    api = HfApi(token=options.token)
    revision = options.revision
    if file is not None:
        files = {file: api.parse_safetensors_file_metadata(repo, file, revision=revision)}
    else:
        try:
            files = api.get_safetensors_metadata(repo, revision=revision).files_metadata
        except NotASafetensorsRepoError:
            revision = converted_revision(repo, options)
            if revision is None:
                names = api.list_repo_files(repo, revision=options.revision)
                raise ValueError(no_safetensors(repo, names)) from None
            files = api.get_safetensors_metadata(repo, revision=revision).files_metadata
    tensors = {
        name: TensorInfo(shard, dtype_named(info.dtype, f"{repo}/{shard}"), tuple(info.shape))
        for shard, header in files.items()
        for name, info in header.tensors.items()
    }
    return Checkpoint(repo, tensors, None)
