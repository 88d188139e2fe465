"""`ivtp explain --method`: what any method keeps, and several of them side by side (the paper's Fig. 5)."""

import json

import numpy as np
import pytest
from PIL import Image

import ivtp_cli
from modeling_ivtp import methods
from tests.support.untaught import PATCHES, untaught

QUESTION = "what colour is the disc ?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return untaught(tmp_path_factory.mktemp("explain") / "model")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("explain") / "photo.png"
    Image.effect_mandelbrot((200, 180), (-2, -1.5, 1, 1.5), 40).convert("RGB").save(path)
    return path


@pytest.fixture
def explain(model, photo, capsys):
    def run(*options, question=QUESTION):
        capsys.readouterr()
        arguments = ["explain", "-m", model, "-i", photo, "-p", question, *options]
        status = ivtp_cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.METHODS)
def test_any_method_is_explained(explain, tmp_path, name):
    status, out, err = explain("--method", name, "--visual-tokens", 20, "--json", tmp_path / "trace.json")
    assert (status, err) == (0, "")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["method"] == name
    assert 1 <= trace["final_tokens"][0] <= 20
    assert out.startswith("1 image" if name == "ivtp" else f"{name}: 1 image")


@pytest.mark.slow
def test_several_methods_are_explained_at_one_budget_and_drawn_side_by_side(explain, tmp_path):
    picture, data = tmp_path / "fig5.png", tmp_path / "fig5.json"
    options = ["--method", "topk", "--method", "ivtp", "--visual-tokens", 12, "--out", picture, "--json", data]
    status, out, err = explain(*options)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line for line in lines if line.startswith(f"topk: 1 image: {PATCHES} → 12 in the tower")]
    assert [line for line in lines if line.startswith(f"ivtp: 1 image: {PATCHES} → ")]
    traces = json.loads(data.read_text())
    assert [(trace["method"], trace["final_tokens"]) for trace in traces] == [("topk", [12]), ("ivtp", [12])]
    one, three = tmp_path / "one.png", np.asarray(Image.open(picture)).shape
    explain("--method", "topk", "--out", one)
    assert three[1] > np.asarray(Image.open(one)).shape[1]


@pytest.mark.slow
def test_a_method_that_asks_no_word_is_drawn_under_the_question_too(explain, tmp_path):
    for file, question in (("short.png", QUESTION), ("long.png", QUESTION * 9)):
        explain("--method", "topk", "--out", tmp_path / file, question=question)
    short, long = (Image.open(tmp_path / file).height for file in ("short.png", "long.png"))
    assert long > short + 30


@pytest.mark.slow
def test_without_a_budget_every_method_has_the_models(explain, tmp_path):
    explain("--method", "fastv", "--method", "ivtp", "--json", tmp_path / "traces.json")
    assert [trace["final_tokens"] for trace in json.loads((tmp_path / "traces.json").read_text())] == [[64], [64]]


def test_a_method_twice_is_shown_once(explain):
    assert explain("--method", "topk", "--method", "topk")[1].count("1 image") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "top"], "Unknown method 'top'; allowed: random, topk, topk+,"),
        (["--method", "topk", "--visual-tokens", PATCHES], f"keeps all {PATCHES} patches"),
    ],
)
def test_what_cannot_be_explained_is_told_in_one_line(explain, options, message):
    status, out, err = explain(*options)
    assert (status, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_help_says_how_methods_are_compared(capsys):
    ivtp_cli.main(["explain", "--help"])
    assert "--method" in (text := capsys.readouterr().out)
    assert "Fig. 5" in text
