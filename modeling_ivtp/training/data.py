"""Conversations about pictures, in LLaVA's format: rows with `id`, `image` and `conversations`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.sources import is_hub_id

IMAGE = "<image>"
"""Mark of a picture in the texts of LLaVA's data, whatever the tokenizer calls it."""
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """One row.

    Attributes
    ----------
    name : str
        Its id or number, as errors name it.
    images : tuple of (Path, bytes or PIL image)
    messages : tuple of (str, str)
        Role and text, `IMAGE` included; user and assistant by turns, a system message before them or none.
    """

    name: str
    images: tuple[Any, ...]
    messages: tuple[tuple[str, str], ...]


def read_conversation(row: Any, number: int, folder: Path) -> Conversation:
    """Read a row as LLaVA's training does.

    Parameters
    ----------
    row : mapping
        `conversations`, a list of `{"from": "human" or "gpt", "value": text}`; `image` (or `images`), a path, a file's
        bytes, a picture or a list of them; `id`. A turn of the model before the first question is left out.
    number : int
        Its place in the data.
    folder : Path
        The folder that relative paths start from.

    Raises
    ------
    ValueError
        If the row has no conversation, no answer, or another number of pictures than of places for them.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"row {number} is no object, but {type(row).__name__}")
    name = f"row {number}" if row.get("id") is None else f"row {number} (id {row['id']})"
    turns = row.get("conversations")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ValueError(f"{name} has no conversations; its fields: {', '.join(map(str, row))}")
    messages = [_message(turn, name) for turn in turns]
    system = messages[:1] if messages[0][0] == "system" else []
    spoken = messages[len(system) :]
    while spoken and spoken[0][0] != "user":
        spoken = spoken[1:]
    if [role for role, _ in spoken] != [("user", "assistant")[turn % 2] for turn in range(len(spoken))]:
        raise ValueError(
            f"{name}: its turns are {', '.join(role for role, _ in messages)}; allowed: user, assistant, …"
        )
    if len(spoken) % 2:
        if IMAGE in spoken[-1][1]:
            raise ValueError(f"{name}: its last question has an {IMAGE} and no answer; leave it out, or answer it")
        spoken = spoken[:-1]  # a question that nobody answered
    if not any(text.strip() for role, text in spoken if role == "assistant"):
        raise ValueError(f"{name} has no answer to learn from")
    images = _images(row, folder, name)
    places = sum(text.count(IMAGE) for role, text in spoken if role == "user")
    if images and not places:
        spoken[0] = ("user", f"{IMAGE}\n" * len(images) + spoken[0][1])
    elif len(images) != places:
        raise ValueError(f"{name} has {places} {IMAGE} and {len(images)} pictures")
    return Conversation(name, images, (*system, *spoken))


def _message(turn: Any, name: str) -> tuple[str, str]:
    who = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
    text = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
    if who not in _ROLES or not isinstance(text, str):
        raise ValueError(f'{name}: a turn is {turn!r:.80}; allowed: {{"from": "human" or "gpt", "value": a text}}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: a turn is no text: half of a character stands at {error.start}") from error
    return _ROLES[who], text


def _images(row: Mapping[str, Any], folder: Path, name: str) -> tuple[Any, ...]:
    """Return the pictures of a row, from whichever of the two fields has any."""
    fields = [_listed(row.get(field)) for field in ("image", "images")]
    if all(fields):
        raise ValueError(f"{name} has pictures in image and in images; allowed: one of the two")
    return tuple(_image(image, folder) for image in fields[0] or fields[1])


def _listed(found: Any) -> list[Any]:
    """Return a field's pictures; `datasets` fills fields that a row lacks with nothing, in several ways."""
    listed = list(found) if isinstance(found, (list, tuple)) else [found]
    return [one for one in listed if not _is_nothing(one)]


def _is_nothing(image: Any) -> bool:
    if isinstance(image, Mapping):
        return image.get("bytes") is None and image.get("path") is None
    return image is None or (isinstance(image, str) and not image)


def _image(image: Any, folder: Path) -> Any:
    if isinstance(image, Mapping):  # how `datasets` stores a picture
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    return folder / Path(image).expanduser() if isinstance(image, str) else image


class Conversations(torch.utils.data.Dataset):
    """The rows of a data set, read when they are asked for.

    Parameters
    ----------
    rows : sequence of mapping
    folder : Path
        The folder that relative paths of pictures start from.
    numbers : sequence of int, optional
        The rows to show, in this order; default: all.
    """

    def __init__(self, rows: Any, folder: Path, numbers: Sequence[int] | None = None) -> None:
        self.rows, self.folder = rows, folder
        self.numbers: Sequence[int] = range(len(rows)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Conversation:
        number = self.numbers[place]
        return read_conversation(self.rows[number], number, self.folder)

    def check_pictures(self, needed: bool) -> None:
        """Check every row, and that the files of its pictures are there.

        Parameters
        ----------
        needed : bool
            Whether each row needs a picture: what learns is reached through pictures alone.

        Raises
        ------
        ValueError
            For a row that is damaged or has no picture where one is needed, or if no row has one.
        FileNotFoundError
            For a picture that is missing.
        """
        seen = False
        for place in range(len(self)):
            row = self[place]
            seen |= bool(row.images)
            if needed and not row.images:
                raise ValueError(
                    f"{row.name} has no picture, and a batch without pictures trains neither projector nor connector; "
                    "train the language model too, or leave rows without pictures out"
                )
            for image in row.images:
                if isinstance(image, Path) and not image.is_file():
                    raise FileNotFoundError(f"{row.name}: its picture {image} is not there")
        if not seen:
            raise ValueError("no row has a picture")

    def split(self, share: float, seed: int) -> tuple[Conversations, Conversations | None]:
        """Hold out a share of the rows, the same ones for the same seed; None if that are none.

        Raises
        ------
        ValueError
            If nothing would be left to learn from.
        """
        held = round(share * len(self))
        if share and not held:
            raise ValueError(f"evaluation_share={share} of {len(self)} rows is none; allowed: at least {1 / len(self)}")
        if held >= len(self):
            raise ValueError(f"evaluation_share={share} leaves none of {len(self)} rows to learn from")
        if not held:
            return self, None
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        parts = (sorted(order[held:]), sorted(order[:held]))
        learn, hold = (Conversations(self.rows, self.folder, [self.numbers[n] for n in part]) for part in parts)
        return learn, hold

    def fingerprint(self) -> str:
        """Return a fingerprint of the rows that are shown: 64 hexadecimal digits; pictures count by their names."""
        digest = hashlib.sha256()
        for number in self.numbers:
            row = read_conversation(self.rows[number], number, Path())
            images = [str(image) if isinstance(image, Path) else "" for image in row.images]
            digest.update(json.dumps([row.name, images, row.messages]).encode())
        return digest.hexdigest()


def open_conversations(source: str, images: Path | None = None, limit: int | None = None) -> Conversations:
    """Open a data set.

    Parameters
    ----------
    source : str
        A `.json` (a list) or `.jsonl` file, or a folder or Hub id (with `:SPLIT` after it, default `train`) that
        `datasets` reads.
    images : Path, optional
        The folder that relative paths of pictures start from; default: the file's folder, or the data's.
    limit : int, optional
        Number of rows, from the first.

    Raises
    ------
    ValueError
        If the data are damaged or have no rows.
    OSError
        If there are none.
    """
    path = Path(source).expanduser()
    rows: Any
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {source}")
        rows = _read_json(path)
    else:
        rows = _read_datasets(source, path)
    if not len(rows):
        raise ValueError(f"{source} has no rows")
    start = path.parent if path.is_file() else path if path.is_dir() else Path.cwd()
    folder = start if images is None else images.expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return Conversations(rows, folder, range(len(rows))[:limit])


def _read_json(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
        else:  # str.splitlines would also break at separators inside strings, such as U+2028
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds {type(rows).__name__}; allowed: a list of rows, as LLaVA's data are")
    return rows


def _read_datasets(source: str, path: Path) -> Any:
    name, _, split = source.partition(":")
    if not path.is_dir() and not is_hub_id(name):
        raise FileNotFoundError(
            f"there are no data {source!r}: no .json or .jsonl file, no folder, and no name on the Hub"
        )
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise ImportError(f"{source} needs datasets: pip install 'ivtp-llava[batch]'") from error
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        table = datasets.load_from_disk(str(path))
        if isinstance(table, Mapping):
            table = table["train"]
    else:
        table = datasets.load_dataset(str(path) if path.is_dir() else name, split=split or "train")
    encoded = datasets.Image(decode=False)  # pictures are decoded when they are needed
    for column, kind in table.features.items():
        if isinstance(kind, datasets.Image):
            table = table.cast_column(column, encoded)
        elif isinstance(kind, datasets.List) and isinstance(kind.feature, datasets.Image):
            table = table.cast_column(column, datasets.List(encoded))
    return table
