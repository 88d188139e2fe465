"""`ivtp push` of a trained pruner: its two files and a card, which come back from the Hub."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

from modeling_ivtp import trained
from modeling_ivtp.cli import main
from modeling_ivtp.publish import push as pushing
from modeling_ivtp.publish.staging import stage
from tests.support.hub_server import OWNER, TOKEN, Hub, running_hub
from tests.support.tiny import tiny_model
from tests.support.trained import ready

NAME = f"{OWNER}/lvpruning"
_Api = pushing.HfApi


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # Made of the endpoint when the library is imported.
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(pushing, "HfApi", lambda **options: _Api(endpoint=server.url, **options))
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ready(trained.LVPruning(ratio=0.6, text="all"), tiny_model()).save(tmp_path / "pruner")
    (tmp_path / "pruner" / "notes.txt").write_text("mine")
    return tmp_path / "pruner"


def push(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["push", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_what_was_pushed_comes_back(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, out, err = push(capsys, folder, NAME, "--yes")
    assert (status, err) == (0, "")
    assert "checked: the modules load" in out
    assert "stays here: notes.txt" in out
    assert f'pinned: trained.load("{NAME}", revision="' in out
    tree = hub.head(NAME)
    assert set(tree) == {"config.json", "model.safetensors", "README.md", ".gitattributes"}
    there = tmp_path / "there"
    there.mkdir()
    for name, content in tree.items():
        (there / name).write_bytes(content)
    downloaded = []
    monkeypatch.setattr(
        "modeling_ivtp.trained.adapter.snapshot_download",
        lambda repo, **options: downloaded.append((repo, options)) or str(there),
    )
    loaded, saved = trained.load(NAME, revision="a"), trained.load(folder)
    assert downloaded[0][0] == NAME
    assert downloaded[0][1]["revision"] == "a"
    assert loaded == saved
    assert all(
        torch.equal(value, saved.learned.state_dict()[name]) for name, value in loaded.learned.state_dict().items()
    )


_OLD_MODEL = {
    "config.json": b'{"model_type": "llava"}',
    "README.md": b"my own card",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "preprocessor_config.json": b"{}",
    "train.py": b"mine",
}


@pytest.mark.parametrize("config", [_OLD_MODEL["config.json"], b"[]", b"no JSON"], ids=str)
def test_a_pruner_does_not_replace_a_model(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str], config: bytes
) -> None:
    hub.publish(NAME, before := _OLD_MODEL | {"config.json": config})
    status, _, err = push(capsys, folder, NAME, "--yes")
    assert status == 1
    assert f"{NAME} holds a model, and a trained pruner would replace it" in err
    assert err.count("\n") == 1
    assert hub.head(NAME) == before


def test_a_pruner_pushed_again_removes_nothing_and_says_what_it_replaces(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(capsys, folder, NAME, "--yes")[0] == 0
    mine = {"train.py": b"mine", "preprocessor_config.json": b"{}", "README.md": b"my own card"}
    hub.publish(NAME, hub.head(NAME) | mine)
    status, out, _ = push(capsys, folder, NAME, "--yes")
    assert status == 0
    assert "removed there" not in out
    assert "replaced there: README.md, config.json, model.safetensors" in out
    assert {"train.py", "preprocessor_config.json"} <= set(hub.head(NAME))


def test_the_card_says_what_the_modules_are(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    repository = stage(folder, NAME, tmp_path / "out", revision="beta")
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.pipeline_tag == "image-text-to-text"
    assert {"lvpruning", "token-pruning"} <= set(card.data.tags)
    assert "LVPruning (Sun et al., 2025)" in card.text
    assert "| `ratio` | `0.6` |" in card.text
    assert "llama, 6 layers, width 32, 16 visual tokens" in card.text
    assert f'trained.load("{NAME}", revision="beta")' in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    tree = ast.parse(code)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    made = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    assert {name.id for name in names} <= imported | made | {"print"}
    assert "not measured" in card.text
    assert repository.pruner


def test_the_card_of_modules_that_were_trained_with_their_model_asks_for_this_one(tmp_path: Path) -> None:
    model = tiny_model()
    model.config._name_or_path = "owner/original"
    method = ready(trained.LVPruning(ratio=0.6), model)
    cards = {}
    for name, base in (("frozen", None), ("tuned", model)):
        method.save(tmp_path / name, model=base)
        (tmp_path / f"{name}-out").mkdir()
        stage(tmp_path / name, NAME, tmp_path / f"{name}-out")
        cards[name] = (tmp_path / f"{name}-out" / "README.md").read_text()
    assert 'Generation.from_llava("owner/original")' in cards["frozen"]
    assert 'Processor.from_llava("owner/original")' in cards["frozen"]
    assert "change none of its weights" in cards["frozen"]
    assert 'from_llava("FINE-TUNED")' in cards["tuned"]
    assert "fine-tuned together with them" in cards["tuned"]
    assert "fine-tuned from `owner/original`" in cards["tuned"]
    assert "change none" not in cards["tuned"]


def test_the_path_of_a_folder_is_not_uploaded(folder: Path, tmp_path: Path) -> None:
    note = json.loads((folder / "config.json").read_text())
    note["base"]["name_or_path"] = "/models/llava"  # as 0.2.0 saved it
    (folder / "config.json").write_text(json.dumps(note))
    (tmp_path / "out").mkdir()
    stage(folder, NAME, tmp_path / "out")
    assert all(b"/models/llava" not in file.read_bytes() for file in (tmp_path / "out").iterdir())
    assert trained.load(tmp_path / "out") == trained.load(folder)
    assert json.loads((folder / "config.json").read_text()) == note


def test_the_card_of_sparse_attention_says_whose_it_is_not(tmp_path: Path) -> None:
    ready(trained.SparseAttention(keep=4, sparsity="entropy"), tiny_model()).save(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    stage(tmp_path / "adapter", f"{OWNER}/sparse", tmp_path / "out")
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert "the method `sparse-attention`, after a summary that goes by the name of IVTP, and is not it." in card.text
    assert "| `sparsity` | `entropy` |" in card.text


def test_a_damaged_pruner_or_a_missing_card_is_refused_before_anything_is_sent(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = push(capsys, folder, NAME, "--yes", "--card", "nowhere.md")
    assert status == 1
    assert "there is no card 'nowhere.md'; allowed for a trained pruner: a file, or none" in err
    (folder / "model.safetensors").write_bytes(b"")
    status, _, err = push(capsys, folder, NAME, "--yes")
    assert status == 1
    assert "model.safetensors is damaged or cut short" in err
    assert NAME not in hub.repos
