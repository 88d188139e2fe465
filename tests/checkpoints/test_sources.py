"""A checkpoint that is nowhere is named at once, without waiting for downloads that are tried again."""

import time
from contextlib import nullcontext

import httpx
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

import ivtp_cli
from modeling_ivtp.checkpoints import sources


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--prompt", "x", "--model"],
        ["explain", "--prompt", "x", "--image", "hub_cards/ivtp-llava-miniature/images/scene.png", "--model"],
        ["serve"],
        ["flops", "--model"],
        ["convert", "--clip", "nothere/clip", "--out", "nowhere"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("reachable", [True, False], ids=["hub", "no network"])
def test_a_model_that_is_nowhere_is_named_at_once(capsys, monkeypatch, arguments, reachable):
    calls = []

    def model_info(self, repo, **options):
        calls.append(repo)
        if reachable:
            request = httpx.Request("GET", "http://hub.test")
            raise RepositoryNotFoundError("404", response=httpx.Response(404, request=request))
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(sources.HfApi, "model_info", model_info)
    monkeypatch.setattr("ivtp_cli.serve._bound", lambda *_: nullcontext())
    start = time.monotonic()
    assert ivtp_cli.main([*arguments, "nothere/folder"]) == 1
    assert time.monotonic() - start < 20
    error = capsys.readouterr().err
    assert calls == ["nothere/folder"]
    assert len(error.splitlines()) == 1
    if reachable:
        assert "nothere/folder is neither a folder here nor a repository on the Hugging Face Hub" in error
    else:
        assert "nothere/folder is no folder here, and the Hugging Face Hub cannot be reached: Name or ser" in error
