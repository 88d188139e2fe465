"""A model or data set that is neither here nor on the Hub: one line at once, whichever command asks for it."""

import socket
import time

import datasets
import pytest
from huggingface_hub import constants

import ivtp_cli
from tests.support.hub_server import Fault, running_hub

MISSING, READABLE = "nothere/folder", "on the Hugging Face Hub that you may read"
SMALL = ["--decoder-layers", "4", "--layers-per-group", "2"]
MODEL_COMMANDS = {
    "generate": ["generate", "-m", MISSING, "-p", "What?"],
    "explain": ["explain", "-m", MISSING, "-p", "What?", "-i", "{image}"],
    "batch": ["batch", "-m", MISSING, "-d", "{rows}", "-o", "{out}"],
    "flops": ["flops", "--model", MISSING],
    "bench": ["bench", "--model", MISSING, "--out", "{out}"],
    "convert": ["convert", MISSING, "--clip", "{out}", "--out", "{out}"],
    "convert --stock": ["convert", MISSING, "--stock", "--out", "{out}"],
    "convert --clip": ["convert", "{llava}", "--clip", MISSING, "--out", "{out}", *SMALL],
    "serve": ["serve", MISSING, "--port", "{port}"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the commands need beside the model."""
    from PIL import Image

    from tests.support.checkpoints import llava_folder

    root = tmp_path_factory.mktemp("places")
    llava_folder(root / "llava")
    Image.new("RGB", (20, 20)).save(root / "image.png")
    (root / "rows.jsonl").write_text('{"image": null, "question": "Why?"}\n')
    return {"llava": root / "llava", "image": root / "image.png", "rows": root / "rows.jsonl"}


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """Nothing was downloaded before, and nobody waits to try again."""

    def sleep(seconds):
        raise AssertionError(f"tried again after {seconds} seconds")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(time, "sleep", sleep)


def one_line(capsys, arguments, places):
    filled = [argument.format(**places, port=closed_port()) for argument in arguments]
    capsys.readouterr()
    status = ivtp_cli.main(filled)
    captured = capsys.readouterr()
    assert (status, captured.out) == (1, "")
    (line,) = captured.err.splitlines()
    return line


def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("command", MODEL_COMMANDS)
def test_a_hub_without_the_repository(capsys, places, no_cache, monkeypatch, tmp_path, command):
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        line = one_line(capsys, MODEL_COMMANDS[command], places | {"out": tmp_path / "out"})
        assert len(hub.requests) <= 2
    assert (
        line == f"ivtp: {MISSING} is neither a folder here nor a repository on the Hugging Face Hub that you may read"
    )


@pytest.mark.parametrize("command", MODEL_COMMANDS)
def test_a_hub_that_cannot_be_reached(capsys, places, no_cache, monkeypatch, tmp_path, command):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    line = one_line(capsys, MODEL_COMMANDS[command], places | {"out": tmp_path / "out"})
    assert line.startswith(f"ivtp: {MISSING} is no folder here, and the Hugging Face Hub cannot be reached: ")
    assert len(line) < 200


@pytest.mark.parametrize("command", ["generate", "flops", "convert", "serve"])
def test_no_request_is_made_offline(capsys, places, no_cache, monkeypatch, tmp_path, command):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = one_line(capsys, MODEL_COMMANDS[command], places | {"out": tmp_path / "out"})
    assert line.startswith(f"ivtp: {MISSING} is no folder here, and the Hugging Face Hub cannot be reached: ")
    assert "offline" in line


@pytest.mark.parametrize("command", MODEL_COMMANDS)
def test_a_variable_that_is_not_set_names_no_checkpoint(capsys, places, tmp_path, command):
    arguments = ["" if argument == MISSING else argument for argument in MODEL_COMMANDS[command]]
    line = one_line(capsys, arguments, places | {"out": tmp_path / "out"})
    assert line.startswith("ivtp: the checkpoint has no name; give a folder, or a name on the Hugging Face Hub")
    assert not (tmp_path / "out").exists()


def test_data_on_a_hub_that_cannot_be_reached(capsys, places, no_cache, monkeypatch, tmp_path):
    endpoint = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    arguments = ["batch", "-m", "{llava}", "-d", MISSING, "-o", "{out}"]
    line = one_line(capsys, arguments, places | {"out": tmp_path / "out"})
    assert line.startswith(f"ivtp: {MISSING} is no file or folder here, and the Hugging Face Hub cannot be reached: ")


@pytest.mark.slow
def test_data_that_the_hub_does_not_have(capsys, places, no_cache, monkeypatch, tmp_path):
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        hub.faults.append(Fault("GET", f"/api/datasets/{MISSING}", 404, {"X-Error-Code": "RepoNotFound"}))
        arguments = ["batch", "-m", "{llava}", "-d", f"{MISSING}:config", "-o", "{out}"]
        line = one_line(capsys, arguments, places | {"out": tmp_path / "out"})
    assert line == f"ivtp: {MISSING} is neither a file or folder here nor a data set {READABLE}"
