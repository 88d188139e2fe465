"""LoRA adapters: a folder or repository that holds one alone is no whole model, and says so."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from transformers.utils import find_adapter_config_file

HUB_ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
"""Arguments of `from_pretrained` that say how to reach the Hub."""


def adapter_message(source: Any, config_file: Any = None) -> str:
    """Return the message that `source` is an adapter, and how it becomes a whole model.

    Parameters
    ----------
    source : str or path
        The folder or Hub id.
    config_file : path, optional
        Its adapter_config.json, which names the base.
    """
    base = None if config_file is None else json.loads(Path(config_file).read_text()).get("base_model_name_or_path")
    return (
        f"{source} is a LoRA adapter{f' of {base}' if base else ''}, not a whole model: merge it first, "
        "PeftModel.from_pretrained(BASE_MODEL, ADAPTER).merge_and_unload().save_pretrained(FOLDER), and save the "
        "base's processor into the same folder"
    )


def _is_out_of_reach(error: BaseException | None) -> bool:
    """Return whether an error came from a repository that is not there, or cannot be reached."""
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | RepositoryNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def naming_adapter(source: Any, **options: Any) -> Iterator[None]:
    """Say that `source` is an adapter where a library only misses a file of a whole model.

    Parameters
    ----------
    source : str or path
        The folder or Hub id that is read.
    **options
        Arguments of `from_pretrained`; access to the Hub and `revision` are used.

    Raises
    ------
    OSError
        In place of the library's own error, if there is an adapter_config.json.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if _is_out_of_reach(error):
            raise  # to look for one more file would take as long again
        access = {name: options[name] for name in (*HUB_ACCESS, "revision") if options.get(name) is not None}
        config_file = find_adapter_config_file(str(source), **access)
        if config_file is None:
            raise
        raise OSError(adapter_message(source, config_file)) from error
