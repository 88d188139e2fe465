"""The command line does its job, and whatever goes wrong is one line on standard error and exit status 1."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from modeling_ivtp import IVTPLlavaForConditionalGeneration, IVTPLlavaProcessor, cli
from modeling_ivtp.hub import answering, convert
from tests.checkpoints import PRUNING, clip_folder, llava_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    clip_folder(root / "clip", llava_folder(root / "llava"))
    convert.convert(root / "llava", root / "clip", root / "ivtp", pruning=PRUNING)
    Image.effect_noise((90, 60), 80).convert("RGB").save(root / "photo.png")
    return SimpleNamespace(llava=root / "llava", clip=root / "clip", ivtp=root / "ivtp", photo=root / "photo.png")


def run(capsys, *arguments):
    """Exit status, standard output and standard error of a command."""
    capsys.readouterr()
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys, *arguments):
    """The one line a command that cannot work says."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("ivtp: ")
    return err


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["generate", "-h"], ["explain", "--help"]])
def test_help(capsys, arguments):
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    assert "Usage: ivtp" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paint"], "paint"),
        (["generate", "--model", "x"], "prompt"),
        (["generate", "--model", "x", "--prompt", "y", "--max-new-tokens", "0"], "max-new-tokens"),
        (["generate", "--model", "x", "--prompt", "y", "--visual-tokens", "many"], "visual-tokens"),
        (["convert"], "llava"),
        (["convert", "x", "--out"], "out"),
    ],
)
def test_wrong_usage_is_one_line(capsys, arguments, message):
    assert message in fails(capsys, *arguments).lower()


def test_convert(capsys, made, tmp_path):
    options = ["--clip", made.clip, "--decoder-layers", 4, "--layers-per-group", 2, "--visual-tokens", 3]
    options += ["--max-shard-size", "300KB", "--dtype", "float16"]
    status, out, err = run(capsys, "convert", made.llava, "--out", tmp_path / "out", *options, "--dry-run")
    assert (status, err) == (0, "")
    assert "would write" in out
    assert "model-00001-of-" in out
    assert os.listdir(tmp_path) == []
    status, out, err = run(capsys, "convert", made.llava, "--out", tmp_path / "out", *options)
    assert (status, err) == (0, "")
    assert "float16" in out
    model = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.config.pruning.visual_tokens == 3
    assert "exists and is not empty" in fails(capsys, "convert", made.llava, "--out", tmp_path / "out", *options)
    assert run(capsys, "convert", made.llava, "--out", tmp_path / "out", *options, "--overwrite")[0] == 0


def test_convert_refuses_in_one_line(capsys, made, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert "neither a folder here nor" in fails(capsys, "convert", "./no/where", *out, "--clip", made.clip)
    assert "no text tower" in fails(capsys, "convert", made.llava, *out, "--decoder-layers", 4, "--layers-per-group", 2)
    assert "decoder_layers=12" in fails(capsys, "convert", made.llava, *out, "--clip", made.clip)
    assert "ghosts" in fails(capsys, "convert", made.llava, *out, "--clip", made.clip, "--guidance", "ghosts")
    assert os.listdir(tmp_path) == []


def test_a_warning_is_one_line_too(capsys, made, tmp_path):
    clip_folder(tmp_path / "clip", hidden_act="gelu")
    status, _, err = run(
        capsys, "convert", made.ivtp, "--out", tmp_path / "out", "--clip", tmp_path / "clip", "--dry-run"
    )
    assert status == 0
    assert len(err.splitlines()) == 1
    assert err.startswith("ivtp: warning: the vision tower of")


def test_generate_answers_what_the_model_answers(capsys, made):
    status, out, err = run(
        capsys, "generate", "-m", made.ivtp, "-i", made.photo, "-p", "What is this?", "--max-new-tokens", 5
    )
    assert (status, err) == (0, "")
    model, processor = answering.load_model(made.ivtp, device="cpu")
    prompt = answering.as_prompt(processor, "What is this?", 1)
    inputs = processor(images=Image.open(made.photo), text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert out.strip() == processor.decode(tokens, skip_special_tokens=True).strip()


def test_generate_from_an_official_folder(capsys, made):
    """Its config knows nothing of pruning, so the paper's twelve layers are wanted where there are four."""
    line = fails(capsys, "generate", "-m", made.llava, "-i", made.photo, "-p", "What is this?")
    assert "decoder_layers=12" in line


def test_compare(capsys, made):
    arguments = ["generate", "-m", made.ivtp, "-i", made.photo, "-i", made.photo, "-p", "Which is older?"]
    arguments += ["--max-new-tokens", 3, "--compare"]
    status, out, err = run(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    unpruned, pruned = json.loads(out)["unpruned"], json.loads(out)["pruned"]
    assert unpruned["visual_tokens"] == [16, 16]
    assert unpruned["layer_averaged_tokens"] == 16
    assert pruned["visual_tokens"] == [4, 4]
    assert 4 <= pruned["layer_averaged_tokens"] <= 9
    # Two images, four layers, keys and values of 2 heads of 8 in 4 bytes.
    saved = 2 * (16 - pruned["layer_averaged_tokens"]) * 4 * 2 * 16 * 4
    assert unpruned["kv_bytes"] - pruned["kv_bytes"] == saved
    assert unpruned["seconds"] > 0
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    for row in ("answer", "seconds", "visual tokens, final", "visual tokens, layer-averaged", "KV cache"):
        assert row in out


def test_an_answer_that_looks_like_markup_is_shown_as_it_is(capsys):
    answer = answering.Answer("[/INST] [red]", 3, 0.5, (4,), 7.0, 100)
    cli._print(cli._comparison(answer, answer))
    assert capsys.readouterr().out.count("[/INST] [red]") == 2


def test_visual_tokens_and_text_alone(capsys, made):
    arguments = ["generate", "-m", made.ivtp, "-p", "Hello?", "--max-new-tokens", 2, "--json"]
    answer = json.loads(run(capsys, *arguments, "-i", made.photo, "--visual-tokens", 2)[1])
    assert answer["visual_tokens"] == [2]
    assert json.loads(run(capsys, *arguments)[1])["visual_tokens"] == []
    assert json.loads(run(capsys, *arguments, "-i", made.photo, "--visual-tokens", 999)[1])["visual_tokens"] == [16]
    assert "visual_tokens=0" in fails(capsys, *arguments, "-i", made.photo, "--visual-tokens", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "no-such.png"], "there is no image 'no-such.png'"),
        (["-i", "ftp://x/y.png"], "http, https and data URLs"),
        (["-m", "./no/model"], "neither a folder here nor"),
        (["-p", "<image> and <image>?"], "the prompt has 2 <image>, but there are 1 images"),
        (["-p", "  "], "the prompt is empty"),
        (["--device", "toaster"], "device='toaster' cannot be used"),
        (["--dtype", "int3"], "dtype='int3'; allowed: auto"),
    ],
)
def test_generate_refuses_in_one_line(capsys, made, arguments, message):
    usual = {"-m": made.ivtp, "-i": made.photo, "-p": "What?"}
    usual = {name: value for name, value in usual.items() if name not in arguments}
    assert message in fails(capsys, "generate", *(part for pair in usual.items() for part in pair), *arguments)


def test_a_truncated_checkpoint_is_one_line(capsys, made, tmp_path):
    for file in made.ivtp.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    fails(capsys, "generate", "-m", tmp_path, "-i", made.photo, "-p", "What?")


def test_explain(capsys, made, tmp_path):
    picture, data = tmp_path / "trace.png", tmp_path / "trace.json"
    arguments = ["explain", "-m", made.ivtp, "-i", made.photo, "-p", "What is this?", "--json", data, "--out", picture]
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    assert "16 → 9 in the tower" in out
    assert json.loads(data.read_text())["images"][0]["groups"][0]["stage"] == "tower"
    assert Image.open(picture).size[0] > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "no/such/folder/x.png"], "there is no folder no/such/folder"),
        (["--out", "."], "is a folder"),
        (["--out", "x.docx"], "x.docx has no ending of a picture"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
        (["--visual-tokens", "999"], "Nothing to explain"),
    ],
)
def test_explain_refuses_in_one_line(capsys, made, arguments, message):
    assert message in fails(capsys, "explain", "-m", made.ivtp, "-i", made.photo, "-p", "What?", *arguments)


def test_explain_needs_a_picture(capsys, made):
    assert "at least one --image" in fails(capsys, "explain", "-m", made.ivtp, "-p", "What?")


@pytest.mark.parametrize(("error", "message"), [(KeyError("x"), "KeyError: 'x' (this should"), (OSError(), "OSError")])
def test_even_a_mistake_of_ours_is_one_line(capsys, monkeypatch, error, message):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(convert, "convert", broken)
    assert message in fails(capsys, "convert", "x", "--out", "y")
    for arguments in (["--debug", "convert", "x", "--out", "y"], ["convert", "x", "--out", "y", "--debug"]):
        status, _, err = run(capsys, *arguments)
        assert status == 1
        assert "Traceback" in err


def test_a_long_message_is_one_line(capsys, monkeypatch):
    def broken(*_, **__):
        raise ValueError("first\n  second\n\nthird")

    monkeypatch.setattr(convert, "convert", broken)
    assert fails(capsys, "convert", "x", "--out", "y") == "ivtp: first second third\n"


def test_ctrl_c_exits_with_130(capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert", stopped)
    assert run(capsys, "convert", "x", "--out", "y") == (130, "", "")


def test_the_process_says_the_same():
    result = subprocess.run(
        [sys.executable, "-m", "modeling_ivtp.cli", "convert", "./no/where", "--out", "x", "--clip", "y"],
        capture_output=True,
        text=True,
        cwd=Path(cli.__file__).parents[1],
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert result.returncode == 1
    assert result.stdout == ""
    # Libraries that happen to be installed may say something of their own while they are imported.
    assert len([line for line in result.stderr.splitlines() if line.startswith("ivtp: ")]) == 1
    assert result.stderr.endswith("the name of a repository on the Hugging Face Hub\n")


def test_a_question_becomes_a_prompt(made):
    processor = IVTPLlavaProcessor.from_pretrained(made.ivtp)
    templated = answering.as_prompt(processor, "Why?", 2)
    assert templated == "USER: <image>\n<image>\nWhy? ASSISTANT:"
    processor.chat_template = None
    assert answering.as_prompt(processor, "Why?", 2) == templated
    whole = "[INST] <image>\nWhy? [/INST]"
    assert answering.as_prompt(processor, whole, 1) == whole


def test_kv_bytes_count_what_is_stored():
    layer = SimpleNamespace(keys=torch.zeros(1, 2, 3, 4), values=torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16))
    empty = SimpleNamespace(keys=None, values=None)
    assert answering.kv_bytes(SimpleNamespace(layers=[layer, empty])) == 24 * 4 + 24 * 2
