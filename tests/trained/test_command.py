"""The command line with the folder of a trained pruner after `--method`."""

import json

import pytest
from PIL import Image

import ivtp_cli
from modeling_ivtp import trained
from modeling_ivtp.serving.answering import load_model
from tests.support.trained import ready
from tests.support.untaught import PATCHES, untaught

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    base = untaught(root / "model")
    model, _ = load_model(str(base), device="cpu")
    method = ready(trained.LVPruning(ratio=0.6), model)
    method.save(root / "pruner")
    with method(model):
        tokens = model.model.plan().final_tokens
    Image.effect_mandelbrot((200, 180), (-2, -1.5, 1, 1.5), 40).convert("RGB").save(root / "photo.png")
    return base, root / "pruner", root / "photo.png", tokens


def run(capsys, command, folders, *options):
    capsys.readouterr()
    base, pruner, photo, _ = folders
    arguments = [command, "-m", base, "-i", photo, "-p", "what colour is the disc ?", "--method", pruner, *options]
    status = ivtp_cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate_answers_with_the_saved_budget_or_another(capsys, folders):
    for options, tokens in (((), folders[3]), (("--visual-tokens", 9), 9)):
        status, out, err = run(
            capsys, "generate", folders, "--json", "--max-new-tokens", 3, "--device", "cpu", *options
        )
        assert (status, err) == (0, "")
        assert json.loads(out)["visual_tokens"] == [tokens]
        assert tokens < PATCHES


def test_generate_takes_sparse_attention_with_learned_weights_and_fixed_ones(capsys, folders, tmp_path):
    base, _, *rest = folders
    model, _ = load_model(str(base), device="cpu")
    for fusion in ("learned", "fixed"):
        ready(trained.SparseAttention(keep=7, fusion=fusion), model).save(tmp_path / fusion)
        changed = (base, tmp_path / fusion, *rest)
        status, out, err = run(capsys, "generate", changed, "--json", "--max-new-tokens", 2, "--device", "cpu")
        assert (status, err) == (0, "")
        assert json.loads(out)["visual_tokens"] == [7]


def test_explain_shows_the_modules_choices(capsys, folders, tmp_path):
    status, out, err = run(capsys, "explain", folders, "--json", tmp_path / "trace.json", "--device", "cpu")
    assert (status, err) == (0, "")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert (trace["method"], trace["final_tokens"]) == ("lvpruning", [folders[3]])
    assert out.startswith("lvpruning: 1 image")


def test_an_adapter_of_another_base_is_one_clear_line(capsys, folders, tmp_path):
    base, pruner, *rest = folders
    other = tmp_path / "other"
    method = trained.load(pruner)
    trained.adapter.save(method.with_modules(method.learned, {**method.base, "patches": 99}), other)
    status, out, err = run(capsys, "generate", (base, other, *rest))
    assert (status, out) == (1, "")
    (line,) = err.strip().splitlines()
    assert "this model has patches=144" in line
    assert "allowed: 99" in line
