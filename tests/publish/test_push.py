"""`ivtp push` against a Hub on loopback: what arrives answers in a stranger's hands, and nothing arrives by halves."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load_file, save_file

from modeling_ivtp import IVTPLlavaForConditionalGeneration
from modeling_ivtp.checkpoints.convert import convert
from modeling_ivtp.cli import main
from modeling_ivtp.publish import push as pushing
from modeling_ivtp.publish.staging import stage
from tests.support.checkpoints import clip_folder, llava_folder
from tests.support.hub_server import OWNER, READER, TOKEN, Fault, Hub, running_hub
from tests.support.stranger import HIDE

NAME = f"{OWNER}/ivtp-llava-miniature-32"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The miniature, built by its recipe in several shards, and a tiny one of nobody's."""
    root = tmp_path_factory.mktemp("push")
    convert(None, None, root / "miniature", recipe="ivtp-llava-miniature-32", max_shard_size="10MB", progress=False)
    stock = llava_folder(root / "llava")
    clip_folder(root / "clip", stock)
    return SimpleNamespace(root=root, miniature=root / "miniature", stock=root / "llava", clip=root / "clip")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # Made of the endpoint when the library is imported.
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        # A client made before keeps the address it was made with.
        monkeypatch.setattr(pushing, "HfApi", lambda **options: _Api(endpoint=server.url, **options))
        yield server


_Api = pushing.HfApi


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fresh process, which has tests of its own and takes seconds."""
    monkeypatch.setattr(pushing, "check_fresh", lambda *_: {"generated_text": "yes"})


def push(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["push", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


STRANGER = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
repo, revision, image = sys.argv[1:]
options = {"revision": revision, "code_revision": revision, "trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(repo, **options)
processor = AutoProcessor.from_pretrained(repo, **options)
prompt = "USER: <image>\\nThe tree is on a tile of which colour? ASSISTANT:"
inputs = processor(images=Image.open(image), text=prompt, return_tensors="pt").to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1]:]
said = processor.decode(answer, skip_special_tokens=True).strip()
print(said, model.pruning_config.visual_tokens, type(model).__module__)
"""


def as_stranger(hub: Hub, revision: str, home: Path, *, token: str = "") -> subprocess.CompletedProcess[str]:
    environment = {
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
    } | ({"HF_TOKEN": token} if token else {})
    picture = ROOT / "hub_cards" / "ivtp-llava-miniature" / "images" / "scene.png"
    return subprocess.run(
        [sys.executable, "-c", HIDE + STRANGER, NAME, revision, str(picture)],
        env=environment | {"PYTHONSAFEPATH": "1"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_what_was_pushed_answers_in_a_strangers_hands(
    hub: Hub, folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = push(capsys, folders.miniature, NAME, "--private", "--yes")
    assert (status, err) == (0, "")
    assert "a fresh process loads it and answers 'yellow'" in out
    revision = re.search(r'revision="([0-9a-f]{40})"', out)[1]  # type: ignore[index]
    repo = hub.repos[NAME]
    # One commit after the empty repository's own.
    assert list(repo.commits)[1:] == [revision]
    assert repo.private
    tree = hub.head(NAME)
    assert {"config.json", "README.md", "handler.py", "handler_images.py", "LICENSE", ".gitattributes"} <= set(tree)
    assert {"clip_tokenizer/tokenizer.json", "images/scene.png", "modeling_ivtp.py", "ivtp_recipe.json"} <= set(tree)
    assert len([name for name in tree if name.endswith(".safetensors")]) == 4
    for name in folders.miniature.glob("*.safetensors"):
        assert tree[name.name] == name.read_bytes()

    done = as_stranger(hub, revision, tmp_path, token=READER)
    assert done.returncode == 0, done.stderr[-2000:]
    answer, budget, module = done.stdout.split()
    assert (answer, budget) == ("yellow", "32")
    assert module.startswith("transformers_modules.")
    # A later commit breaks the code; who pinned the old one does not notice.
    later = hub.publish(NAME, dict(tree) | {"modeling_ivtp.py": b"raise RuntimeError('changed')"})
    again = as_stranger(hub, revision, tmp_path, token=READER)
    assert again.returncode == 0, again.stderr[-2000:]
    moved = as_stranger(hub, later, tmp_path, token=READER)
    assert moved.returncode != 0
    assert "changed" in moved.stderr
    # And who may not read it gets nothing.
    (tmp_path / "another").mkdir()
    assert as_stranger(hub, revision, tmp_path / "another").returncode != 0


@pytest.mark.slow
def test_a_dry_run_shows_everything_and_needs_no_network(
    folders: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(*_: Any, **__: Any) -> Any:
        raise AssertionError("a dry run must not use the network")

    monkeypatch.setattr("socket.socket.connect", nowhere)
    before = sorted(Path(folders.miniature).rglob("*"))
    status, out, err = push(capsys, folders.miniature, NAME, "--dry-run")
    assert (status, err) == (0, "")
    assert "model-00001-of-00004.safetensors" in out
    assert "card: ivtp-llava-miniature" in out
    assert "answers 'yellow'" in out
    assert "nothing was sent" in out
    assert sorted(Path(folders.miniature).rglob("*")) == before


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_pushing_again_sends_nothing_again_and_clears_what_is_stale(
    hub: Hub, folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.publish(NAME, {"pytorch_model.bin": b"old", "notes.md": b"mine", "model-00009-of-00009.safetensors": b"old"})
    _, out, _ = push(capsys, folders.miniature, NAME, "--yes")
    assert "removed there" in out
    tree = hub.head(NAME)
    assert "notes.md" in tree
    assert not {"pytorch_model.bin", "model-00009-of-00009.safetensors"} & set(tree)
    revision = re.search(r'revision="([0-9a-f]{40})"', out)[1]  # type: ignore[index]
    hub.requests.clear()
    status, out, _ = push(capsys, folders.miniature, NAME, "--yes")
    assert status == 0
    assert f'revision="{revision}"' in out
    assert "replaced there: " in out
    assert "README.md" in out.partition("replaced there: ")[2].splitlines()[0]
    assert not [request for request in hub.requests if request[0] == "PUT" or "/commit/" in request[1]]


@pytest.mark.usefixtures("unchecked")
def test_a_model_does_not_replace_a_pruner(hub: Hub, folders: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = {"config.json": b'{"pruner": "lvpruning"}', "model.safetensors": b"modules", "README.md": b"mine"}
    hub.publish(NAME, before)
    status, _, err = push(capsys, folders.miniature, NAME, "--yes")
    assert status == 1
    assert f"{NAME} holds a trained pruner, and a model would replace it" in err
    assert hub.head(NAME) == before


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_branches_and_pull_requests(hub: Hub, folders: Any, capsys: pytest.CaptureFixture[str]) -> None:
    hub.publish(NAME, {"notes.md": b"mine"})
    assert push(capsys, folders.miniature, NAME, "--yes", "--revision", "budget-32")[0] == 0
    assert "config.json" in hub.head(NAME, "budget-32")
    assert "config.json" not in hub.head(NAME)
    status, out, _ = push(capsys, folders.miniature, NAME, "--yes", "--create-pr")
    assert status == 0
    assert "discussions/1" in out
    assert "config.json" not in hub.head(NAME)
    assert "config.json" in hub.repos[NAME].commits[hub.repos[NAME].pulls[0]]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_new_branch_holds_nothing_of_the_old_weights(
    hub: Hub, folders: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A branch begins as a copy of main, whose single file transformers would load before any shard."""
    hub.publish(NAME, {"model.safetensors": b"old", "train.py": b"", "scripts/train.py": b"", "notes.md": b"mine"})
    status, _, _ = push(capsys, folders.miniature, NAME, "--yes", "--revision", "b32")
    assert status == 0
    tree = hub.head(NAME, "b32")
    assert "model.safetensors" not in tree
    assert {"train.py", "scripts/train.py", "notes.md"} <= set(tree)
    assert "model.safetensors" in hub.head(NAME)
    # The card of a branch loads and pins that branch.
    card = tree["README.md"].decode()
    assert f'repo, revision = "{NAME}", "b32"' in card
    assert f'model_info("{NAME}", revision="b32").sha' in card


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_what_the_repository_says_of_large_files_stays(hub: Hub, folders: Any) -> None:
    hub.publish(NAME, {".gitattributes": b"*.gguf filter=lfs diff=lfs merge=lfs -text"})
    assert main(["push", str(folders.miniature), NAME, "--yes"]) == 0
    assert hub.head(NAME)[".gitattributes"].startswith(b"*.gguf")


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_hubs_own_words_are_passed_on(hub: Hub, folders: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for status, reason in ((403, "storage limit reached"), (400, "license is not known")):
        hub.faults[:] = [Fault("POST", "/commit/", status=status, headers={"X-Error-Message": reason})]
        _, _, err = push(capsys, folders.miniature, NAME, "--yes")
        assert reason in err
    hub.faults[:] = [
        Fault("POST", "/objects/batch", status=429, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})
    ]
    assert "again in a few minutes" in push(capsys, folders.miniature, NAME, "--yes")[2]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["weights", "pruning", "off"])
def test_a_card_speaks_of_the_weights_and_options_it_was_measured_on(
    folders: Any, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, target = tmp_path / "changed", tmp_path / "repository"
    shutil.copytree(folders.miniature, folder)
    target.mkdir()
    if change == "weights":
        file = next(folder.glob("model-00001*.safetensors"))
        tensors = load_file(file)
        name = next(iter(tensors))
        tensors[name] += 1
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        config = json.loads((folder / "config.json").read_text())
        config["pruning"] |= {"enabled": False} if change == "off" else {"aggregation": "mean"}
        (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        stage(folder, NAME, target)
    card = ModelCard((target / "README.md").read_text())
    assert card.data.eval_results is None
    assert "accuracy in %" not in card.text
    assert any("are not those that recipe" in str(one.message) for one in warned) == (change == "weights")
    (tmp_path / "untouched").mkdir()
    stage(folders.miniature, NAME, tmp_path / "untouched")
    assert ModelCard((tmp_path / "untouched" / "README.md").read_text()).data.eval_results


@pytest.mark.slow
def test_llama_2s_terms_go_along(folders: Any, tmp_path: Path) -> None:
    convert(folders.stock, folders.clip, tmp_path / "own", pruning={"layers_per_group": 2, "decoder_layers": 4})
    (tmp_path / "repository").mkdir()
    with pytest.warns(UserWarning, match="Llama 2 licence asks for a copy of itself"):
        stage(tmp_path / "own", NAME, tmp_path / "repository", card="ivtp-llava-1.5-7b")
    assert "Copyright (c) Meta Platforms" in (tmp_path / "repository" / "NOTICE").read_text()
    text = (tmp_path / "repository" / "README.md").read_text()
    assert "TFLOPs" not in text  # it has not the shape that was counted


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_name_without_owner_is_ones_own(hub: Hub, folders: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = push(capsys, folders.miniature, "mine", "--yes")
    assert status == 0
    assert f"{OWNER}/mine" in out
    assert f'repo, revision = "{OWNER}/mine"' in hub.head(f"{OWNER}/mine")["README.md"].decode()


@pytest.mark.usefixtures("unchecked")
def test_it_asks_before_it_sends(
    hub: Hub, folders: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = push(capsys, folders.miniature, NAME)
    assert status == 1
    assert "--yes" in err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []
    monkeypatch.setattr("typer.confirm", lambda question: bool(asked.append(question)))
    status, out, _ = push(capsys, folders.miniature, NAME)
    assert (status, NAME in hub.repos) == (0, False)
    assert asked == [f"Upload to a new repository, {NAME}?"]
    assert "nothing was sent" in out


FAILURES = {
    "a cut in the middle of the weights": (Fault("PUT", "/large/", cut=100_000), "failed"),
    "trouble while the weights are sent": (Fault("PUT", "/large/", status=500), "a fault of its own (500)"),
    "trouble at the commit": (Fault("POST", "/commit/", status=503), "a fault of its own (503)"),
    "a cut at the commit": (Fault("POST", "/commit/", cut=1000), "failed"),
    "too many requests": (
        Fault("POST", "/objects/batch", status=429, headers={"Retry-After": "17"}),
        "run the same command again in 17 seconds",
    ),
    "somebody else was faster": (Fault("POST", "/commit/", status=412), "somebody else has changed"),
    "a file that is too large": (Fault("POST", "/objects/batch", status=413), "smaller --max-shard-size"),
}


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("what", FAILURES)
def test_an_upload_that_fails_leaves_no_half_and_goes_on_where_it_was(
    hub: Hub, folders: Any, what: str, existing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if existing:
        hub.publish(NAME, {"model.safetensors": b"the old weights", "config.json": b"{}"})
    before = dict(hub.head(NAME)) if existing else {}
    fault, said = FAILURES[what]
    hub.faults.append(Fault(**vars(fault)))
    status, _, err = push(capsys, folders.miniature, NAME, "--yes")
    assert status == 1
    assert said in err
    assert err.count("\n") == 1
    assert "run the same command again" in err or "smaller" in err
    assert hub.head(NAME) == before

    hub.faults.clear()
    there = set(hub.large)
    hub.requests.clear()
    assert push(capsys, folders.miniature, NAME, "--yes")[0] == 0
    assert "config.json" in hub.head(NAME)
    sent = {path.rpartition("/")[2] for method, path in hub.requests if method == "PUT"}
    assert not sent & there


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_fault_that_passes_is_not_noticed(hub: Hub, folders: Any, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults += [Fault("PUT", "/large/", status=503, times=1), Fault("POST", "/objects/batch", status=429, times=1)]
    assert push(capsys, folders.miniature, NAME, "--yes")[0] == 0
    assert "config.json" in hub.head(NAME)


@pytest.mark.usefixtures("unchecked")
def test_tokens_and_names(
    hub: Hub, folders: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for token, said in ((READER, "may not write"), ("hf_wrong", "does not accept the token")):
        status, _, err = push(capsys, folders.miniature, NAME, "--yes", "--token", token)
        assert status == 1
        assert said in err
    assert NAME not in hub.repos
    hub.create("somebody/else", private=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    status, _, err = push(capsys, folders.miniature, NAME, "--yes")
    assert status == 1
    assert "hf auth login" in err
    for name in ("a b/c", "a/b/c", "--x--", "a/" + "b" * 100, "x.git"):
        status, _, err = push(capsys, "--dry-run", "--", folders.miniature, name)
        assert status == 1
        assert "no name of a repository" in err
        assert err.count("\n") == 1


@pytest.mark.usefixtures("unchecked")
def test_empty_names_are_refused(hub: Hub, folders: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """As a variable of the shell that is not set gives them."""
    for option in ("token", "revision"):
        status, _, err = push(capsys, folders.miniature, NAME, "--yes", f"--{option}", "")
        assert (status, err) == (1, f"ivtp: {option} is empty\n")
    # As a path, it would be the current folder.
    status, _, err = push(capsys, "", NAME, "--yes")
    assert (status, err) == (1, "ivtp: there is no folder ''; ivtp convert makes one\n")
    assert NAME not in hub.repos


@pytest.mark.usefixtures("unchecked")
def test_what_shall_be_private_does_not_become_public(
    hub: Hub, folders: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.publish(NAME, {"notes.md": b"mine"})
    status, _, err = push(capsys, folders.miniature, NAME, "--yes", "--private")
    assert status == 1
    assert f"{NAME} is public, and `private` is for a new repository" in err
    assert set(hub.head(NAME)) == {"notes.md"}
    # The same command goes on where its own repository is.
    hub.repos[NAME].private = True
    assert push(capsys, folders.miniature, NAME, "--yes", "--private")[0] == 0


@pytest.mark.usefixtures("unchecked")
def test_a_pull_request_needs_its_branch(hub: Hub, folders: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        status, _, err = push(capsys, folders.miniature, NAME, "--yes", "--create-pr", "--revision", "b32")
        assert status == 1
        assert f"{NAME} has no branch b32 that a pull request could go to" in err
        assert NAME not in hub.repos or set(hub.head(NAME)) == {"notes.md"}
        hub.publish(NAME, {"notes.md": b"mine"})


def test_a_card_in_another_encoding_is_named(folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "card.md").write_bytes("---\nlicense: mit\n---\nGröße".encode("latin-1"))
    status, _, err = push(capsys, folders.miniature, NAME, "--dry-run", "--card", tmp_path / "card.md")
    assert status == 1
    assert f"the card {tmp_path / 'card.md'} is no text in UTF-8" in err


def test_no_network(folders: Any, hub: Hub, unchecked: None, capsys: pytest.CaptureFixture[str]) -> None:
    hub.shutdown()
    hub.server_close()
    status, _, err = push(capsys, folders.miniature, NAME, "--yes")
    assert status == 1
    assert "the connection to" in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_folders_that_are_not_ours(folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "empty").mkdir()
    convert(folders.stock, folders.clip, tmp_path / "damaged", pruning={"layers_per_group": 2, "decoder_layers": 4})
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for folder, said in (
        ("missing", "there is no folder"),
        ("empty", "has no config.json"),
        ("other", "is of model_type 'bert'"),
        ("damaged", "truncated"),
    ):
        status, _, err = push(capsys, tmp_path / folder, NAME, "--dry-run")
        assert status == 1
        assert said in err
        assert err.count("\n") == 1
    status, _, err = push(capsys, folders.stock, NAME, "--dry-run")
    assert status == 1
    assert "is a stock LLaVA" in err
    status, _, err = push(capsys, folders.miniature, NAME, "--dry-run", "--card", "bert")
    assert status == 1
    assert "allowed: a file, or one of ivtp-extended-llava-1.5-13b" in err


@pytest.mark.slow
def test_a_repository_that_does_not_answer_is_not_sent(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = pushing.stage

    def broken(*arguments: Any, **options: Any) -> Any:
        repository = original(*arguments, **options)
        (repository.folder / "schedule.py").unlink()
        return repository

    monkeypatch.setattr(pushing, "stage", broken)
    status, _, err = push(capsys, folders.miniature, NAME, "--dry-run")
    assert status == 1
    assert "a fresh process cannot answer from the repository" in err
    assert "schedule" in err


@pytest.mark.slow
def test_weights_that_do_not_fit_into_memory_are_checked_without_loading_them(
    folders: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    status, out, _ = push(capsys, folders.miniature, NAME, "--dry-run")
    assert status == 0
    assert "weights and code fit; there is too little free memory" in out


@pytest.mark.slow
def test_a_checkpoint_of_ones_own_gets_a_card_that_claims_nothing(
    folders: Any, tmp_path: Path, hub: Hub, unchecked: None
) -> None:
    convert(folders.stock, folders.clip, tmp_path / "own", pruning={"layers_per_group": 2, "decoder_layers": 4})
    assert main(["push", str(tmp_path / "own"), f"{OWNER}/own", "--yes"]) == 0
    tree = hub.head(f"{OWNER}/own")
    text = tree["README.md"].decode()
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert card.data.license is None
    assert card.data.eval_results is None
    assert "TFLOPs" not in text
    assert "Nothing was trained" not in text
    assert "how these weights came to be is not known" in " ".join(text.split())
    assert "LICENSE-CODE" in tree
    # Somebody's own card stays.
    (tmp_path / "own" / "README.md").write_text("---\nlicense: mit\n---\nmine")
    assert main(["push", str(tmp_path / "own"), f"{OWNER}/own", "--yes"]) == 0
    assert hub.head(f"{OWNER}/own")["README.md"] == b"---\nlicense: mit\n---\nmine"


def test_a_card_says_that_it_loses_more_than_the_paper_where_it_does() -> None:
    says = [
        "It loses more to pruning than the paper" in (ROOT / "hub_cards" / name / "README.md").read_text()
        for name in ("ivtp-llava-miniature", "ivtp-extended-llava-miniature")
    ]
    assert says == [True, False]


def test_a_model_that_is_pushed_while_it_is_saved_brings_its_processor(
    folders: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = IVTPLlavaForConditionalGeneration.from_pretrained(folders.miniature)
    api = HfApi(endpoint=hub.url, token=TOKEN)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: api)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: api)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=f"{OWNER}/saved")
    files = hub.head(f"{OWNER}/saved")
    assert {"config.json", "model.safetensors", "processor_config.json", "clip_tokenizer/tokenizer.json"} <= set(files)
