"""The command line does its job, and whatever goes wrong is one line on standard error and exit status 1."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from PIL import Image

import ivtp_cli
from benchmarks.quality import evaluate_quality
from ivtp_cli import quality
from ivtp_cli.generate import _comparison
from ivtp_cli.tables import show
from modeling_ivtp import IVTPLlavaForConditionalGeneration, IVTPLlavaProcessor
from modeling_ivtp.checkpoints import convert
from modeling_ivtp.publish import push as pushing
from modeling_ivtp.serving import answering
from tests.support.checkpoints import PRUNING, clip_folder, llava_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    clip_folder(root / "clip", llava_folder(root / "llava"))
    convert.convert(root / "llava", root / "clip", root / "ivtp", pruning=PRUNING)
    convert.convert(root / "ivtp", None, root / "shards", max_shard_size="300KB")
    Image.effect_noise((90, 60), 80).convert("RGB").save(root / "photo.png")
    return SimpleNamespace(
        llava=root / "llava",
        clip=root / "clip",
        ivtp=root / "ivtp",
        shards=root / "shards",
        photo=root / "photo.png",
    )


def run(capsys, *arguments):
    """Exit status, standard output and standard error of a command."""
    capsys.readouterr()
    status = ivtp_cli.main([str(argument) for argument in arguments])
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


def process(*arguments, **environment):
    """A command as a process of its own, finished."""
    return subprocess.run(
        [sys.executable, "-m", "modeling_ivtp.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


def test_without_a_command_the_help_is_shown(capsys):
    for arguments in ([], ["--debug"]):
        status, out, err = run(capsys, *arguments)
        assert (status, err) == (0, "")
        assert "Usage: ivtp" in out
        assert "explain" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paint"], "paint"),
        (["generate", "--model", "x"], "prompt"),
        (["generate", "--model", "x", "--prompt", "y", "--max-new-tokens", "0"], "max-new-tokens"),
        (["generate", "--model", "x", "--prompt", "y", "--visual-tokens", "many"], "visual-tokens"),
        (["convert"], "out"),
        (["convert", "--out", "y"], "name the llava to start from, or a recipe that does"),
        (["convert", "x", "--out"], "out"),
        (["convert", "x", "--out", "y", "--max-shard-size", "lots"], "--max-shard-size='lots'; allowed: a number"),
        (["convert", "x", "--out", "y", "--max-shard-size", "0"], "--max-shard-size='0'; allowed: a number"),
        (["convert", "x", "--out", "y", "--layers-per-group", "0"], "--layers-per-group='0'; allowed: a whole number"),
        (["convert", "x", "--out", "y", "--layers-per-group", "some"], "from 1, or all"),
    ],
)
def test_wrong_usage_is_one_line(capsys, arguments, message):
    assert message in fails(capsys, *arguments).lower()


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--visual-tokens", "0", "greater than or equal to 1"),
        ("--visual-tokens", "many", "a valid integer"),
        ("--text-tokens", "-5", "greater than or equal to 0"),
    ],
)
def test_a_wrong_number_is_named_with_what_is_allowed(capsys, option, value, allowed):
    message = fails(capsys, "flops", "--preset", "llava-1.5-7b", option, value)
    # Older versions of typer word it themselves, with the value in front.
    assert (
        f"'{value}'; allowed: {allowed}" in message
        or f"'{option}': {value} is not in the range" in message
        or (f"'{value}' is not a valid int" in message)
    )


@pytest.mark.slow
def test_convert(capsys, folders, tmp_path):
    options = ["--clip", folders.clip, "--decoder-layers", 4, "--layers-per-group", 2, "--visual-tokens", 3]
    options += ["--max-shard-size", "300KB", "--dtype", "float16"]
    options += ["--importance", "accumulated", "--choice", "diverse", "--sharpness", 0.5]
    status, out, err = run(capsys, "convert", folders.llava, "--out", tmp_path / "out", *options, "--dry-run")
    assert (status, err) == (0, "")
    assert "would write" in out
    assert "model-00001-of-" in out
    assert os.listdir(tmp_path) == []
    status, out, err = run(capsys, "convert", folders.llava, "--out", tmp_path / "out", *options)
    assert (status, err) == (0, "")
    assert "float16" in out
    model = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    pruning = model.config.pruning
    assert (pruning.visual_tokens, pruning.importance, pruning.choice) == (3, "accumulated", "diverse")
    assert pruning.sharpness == 0.5
    assert "exists and is not empty" in fails(capsys, "convert", folders.llava, "--out", tmp_path / "out", *options)
    assert run(capsys, "convert", folders.llava, "--out", tmp_path / "out", *options, "--overwrite")[0] == 0


@pytest.mark.slow
def test_a_stage_can_be_one_group(capsys, folders, tmp_path):
    options = ["--clip", folders.clip, "--decoder-layers", 4]
    assert "layers_per_group=3" in fails(capsys, "convert", folders.llava, "--out", tmp_path / "out", *options)
    options += ["--layers-per-group", "all"]
    assert run(capsys, "convert", folders.llava, "--out", tmp_path / "out", *options)[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pruning"]["layers_per_group"] is None


@pytest.mark.slow
def test_convert_refuses_in_one_line(capsys, folders, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert "neither a folder here nor" in fails(capsys, "convert", "./no/where", *out, "--clip", folders.clip)
    assert "no text tower" in fails(
        capsys, "convert", folders.llava, *out, "--decoder-layers", 4, "--layers-per-group", 2
    )
    assert "decoder_layers=12" in fails(capsys, "convert", folders.llava, *out, "--clip", folders.clip)
    assert "ghosts" in fails(capsys, "convert", folders.llava, *out, "--clip", folders.clip, "--guidance", "ghosts")
    assert os.listdir(tmp_path) == []


def test_a_warning_is_one_line_too(capsys, folders, tmp_path):
    clip_folder(tmp_path / "clip", hidden_act="gelu")
    status, _, err = run(
        capsys, "convert", folders.ivtp, "--out", tmp_path / "out", "--clip", tmp_path / "clip", "--dry-run"
    )
    assert status == 0
    assert len(err.splitlines()) == 1
    assert err.startswith("ivtp: warning: the vision tower of")


@pytest.mark.slow
def test_generate_answers_what_the_model_answers(capsys, folders):
    status, out, err = run(
        capsys, "generate", "-m", folders.ivtp, "-i", folders.photo, "-p", "What is this?", "--max-new-tokens", 5
    )
    assert (status, err) == (0, "")
    model, processor = answering.load_model(folders.ivtp, device="cpu")
    prompt = answering.as_prompt(processor, "What is this?", 1)
    inputs = processor(images=Image.open(folders.photo), text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert out.strip() == processor.decode(tokens, skip_special_tokens=True).strip()


def test_generate_from_an_official_folder(capsys, folders):
    """Its config knows nothing of pruning, so the paper's twelve layers are wanted where there are four."""
    line = fails(capsys, "generate", "-m", folders.llava, "-i", folders.photo, "-p", "What is this?")
    assert "decoder_layers=12" in line


@pytest.fixture(scope="module")
def unguided(folders, tmp_path_factory):
    """Folders whose question cannot guide the pruning, and what they lack."""
    root = tmp_path_factory.mktemp("unguided")
    shutil.copytree(folders.llava, root / "official")
    config = json.loads((root / "official" / "config.json").read_text())
    (root / "official" / "config.json").write_text(json.dumps(config | {"pruning": PRUNING}))
    shutil.copytree(folders.ivtp, root / "ours")
    shutil.rmtree(root / "ours" / "clip_tokenizer")
    return {root / "official": "no text tower of CLIP", root / "ours": "no clip_tokenizer/"}


@pytest.mark.slow
def test_what_the_question_needs_and_lacks_is_one_warning(folders, unguided):
    for command, (folder, missing) in zip(("generate", "explain"), unguided.items(), strict=True):
        result = process(command, "-m", folder, "-i", folders.photo, "-p", "What?")
        assert result.returncode == 0
        # Libraries that happen to be installed may say something of their own while they are imported.
        (line,) = (line for line in result.stderr.splitlines() if "clip" in line or "ivtp" in line)
        assert line.startswith(f"ivtp: warning: {folder} has {missing}, so the image alone guides the pruning")
        assert f"`ivtp convert {folder} --clip CLIP --out FOLDER`" in line


@pytest.mark.slow
def test_no_warning_comes_before_an_error_or_without_need(capsys, folders, unguided):
    for folder in unguided:
        assert "the prompt is empty" in fails(capsys, "generate", "-m", folder, "-i", folders.photo, "-p", " ")
        assert "Nothing to explain" in fails(
            capsys, "explain", "-m", folder, "-i", folders.photo, "-p", "What?", "--visual-tokens", 16
        )
        status, _, err = run(capsys, "generate", "-m", folder, "-p", "What?", "--max-new-tokens", 1)
        assert (status, err) == (0, "")


def test_what_the_package_logs_is_one_line_too(capsys, monkeypatch):
    log = logging.getLogger("modeling_ivtp.checkpoints.convert")

    def noisy(*_, **__):
        log.warning("first\nsecond %s", "third")
        raise ValueError("fourth")

    monkeypatch.setattr(convert, "convert", noisy)
    status, out, err = run(capsys, "convert", "x", "--out", "y")
    assert (status, out, err) == (1, "", "ivtp: warning: first second third\nivtp: fourth\n")
    assert not logging.getLogger("modeling_ivtp").handlers
    assert logging.getLogger("modeling_ivtp").propagate


@pytest.mark.slow
def test_compare(capsys, folders):
    arguments = ["generate", "-m", folders.ivtp, "-i", folders.photo, "-i", folders.photo, "-p", "Which is older?"]
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


def test_generate_without_pruning_answers_as_the_unpruned_side_of_compare(capsys, folders):
    arguments = ["generate", "-m", folders.ivtp, "-i", folders.photo, "-p", "What is this?", "--max-new-tokens", 5]
    compared = json.loads(run(capsys, *arguments, "--compare", "--json")[1])["unpruned"]
    status, out, err = run(capsys, *arguments, "--method", "unpruned", "--json")
    assert (status, err) == (0, "")
    alone = json.loads(out)
    assert alone["visual_tokens"] == [16]
    assert {name: value for name, value in alone.items() if name != "seconds"} == {
        name: value for name, value in compared.items() if name != "seconds"
    }
    for more in (["--compare"], ["--visual-tokens", "4"]):
        assert "--method unpruned drops nothing" in fails(capsys, *arguments, "--method", "unpruned", *more)


def test_an_answer_that_looks_like_markup_is_shown_as_it_is(capsys):
    answer = answering.Answer("[/INST] [red]", 3, 0.5, (4,), 7.0, 100)
    show(_comparison(answer, answer))
    assert capsys.readouterr().out.count("[/INST] [red]") == 2


@pytest.mark.slow
def test_visual_tokens_and_text_alone(capsys, folders):
    arguments = ["generate", "-m", folders.ivtp, "-p", "Hello?", "--max-new-tokens", 2, "--json"]
    answer = json.loads(run(capsys, *arguments, "-i", folders.photo, "--visual-tokens", 2)[1])
    assert answer["visual_tokens"] == [2]
    assert json.loads(run(capsys, *arguments)[1])["visual_tokens"] == []
    assert json.loads(run(capsys, *arguments, "-i", folders.photo, "--visual-tokens", 999)[1])["visual_tokens"] == [16]
    assert "visual_tokens=0" in fails(capsys, *arguments, "-i", folders.photo, "--visual-tokens", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_ivtp.model.configuration_ivtp.AUTO_FLOOR", 1)
        own = json.loads(run(capsys, *arguments, "-i", folders.photo, "--visual-tokens", "auto")[1])["visual_tokens"]
    assert len(own) == 1
    assert own[0] < 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "no-such.png"], "there is no image 'no-such.png'"),
        (["-i", "ftp://x/y.png"], "http, https and data URLs"),
        (["-m", "./no/model"], "neither a folder here nor"),
        (["-p", "<image> and <image>?"], "the prompt has 2 <image>, but came with 1 image(s)"),
        (["-p", "  "], "the prompt is empty"),
        (["--device", "toaster"], "device='toaster' cannot be used"),
        (["--dtype", "int3"], "dtype='int3'; allowed: auto"),
    ],
)
def test_generate_refuses_in_one_line(capsys, folders, arguments, message):
    usual = {"-m": folders.ivtp, "-i": folders.photo, "-p": "What?"}
    usual = {name: value for name, value in usual.items() if name not in arguments}
    assert message in fails(capsys, "generate", *(part for pair in usual.items() for part in pair), *arguments)


@pytest.fixture
def shards(folders, tmp_path):
    """A copy of the checkpoint in shards, for a test to damage."""
    return Path(shutil.copytree(folders.shards, tmp_path / "shards"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model-00002-of-*.safetensors", lambda old: old[:-9], "is truncated or not a safetensors file"),
        ("model-00002-of-*.safetensors", lambda old: b"<html>" + old, "is truncated or not a safetensors file"),
        ("model-00002-of-*.safetensors", lambda old: b"", "is truncated or not a safetensors file"),
        ("model-00002-of-*.safetensors", None, "is missing"),
        ("model.safetensors.index.json", lambda old: old[:99], "is not a readable index"),
        ("tokenizer.json", lambda old: b"[1]", "is damaged"),
        ("clip_tokenizer/tokenizer.json", lambda old: old[:99], "is damaged"),
        ("generation_config.json", lambda old: b"[1]", "is damaged"),
    ],
)
def test_a_damaged_file_is_named(capsys, folders, shards, file, content, message):
    (path,) = shards.glob(file)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()))
    for command in ("generate", "explain"):
        assert f"{path} {message}" in fails(capsys, command, "-m", shards, "-i", folders.photo, "-p", "What?")


def test_weights_are_looked_at_before_any_is_loaded(capsys, folders, shards, monkeypatch):
    monkeypatch.setattr(answering.IVTPLlavaForConditionalGeneration, "from_pretrained", None)
    weights = sorted(shards.glob("model-*.safetensors"))[-1]
    weights.write_bytes(weights.read_bytes()[:-9])
    assert str(weights) in fails(capsys, "generate", "-m", shards, "-i", folders.photo, "-p", "What?")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("[1]", "is not a JSON object"),
        ({"model_type": "bert"}, "is of model_type 'bert'; supported are llava, ivtp_llava"),
        ({"text_config": 5}, "cannot be read (StrictDataclassFieldValidationError"),
        ({"dtype": "nope"}, "cannot be read (AttributeError"),
        ({"clip_text_config": 9}, "cannot be read"),
        ({"pruning": 3}, "pruning"),
    ],
)
def test_a_wrong_config_is_one_line(capsys, folders, shards, config, message):
    path = shards / "config.json"
    if config is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | config) if isinstance(config, dict) else config)
    line = fails(capsys, "generate", "-m", shards, "-i", folders.photo, "-p", "What?")
    assert message in line
    assert "should not happen" not in line


def test_weights_that_do_not_fit_the_config_are_named_with_both_shapes(capsys, folders, shards):
    config = json.loads((shards / "config.json").read_text())
    stored = (config["text_config"]["vocab_size"], 32)
    config["text_config"]["vocab_size"] = 2000
    (shards / "config.json").write_text(json.dumps(config))
    line = fails(capsys, "generate", "-m", shards, "-i", folders.photo, "-p", "What?")
    assert "2 tensors of other shapes than its config says" in line
    assert f"lm_head.weight: {stored} in the weights, (2000, 32) by config.json" in line


@pytest.mark.slow
def test_a_damaged_chat_template_is_one_line(capsys, folders, shards):
    (shards / "chat_template.jinja").write_text("{% for x in %}")
    assert "chat template is damaged" in fails(capsys, "generate", "-m", shards, "-i", folders.photo, "-p", "What?")


@pytest.mark.slow
def test_explain(capsys, folders, tmp_path):
    picture, data = tmp_path / "trace.png", tmp_path / "trace.json"
    arguments = [
        "explain",
        "-m",
        folders.ivtp,
        "-i",
        folders.photo,
        "-p",
        "What is this?",
        "--json",
        data,
        "--out",
        picture,
    ]
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    assert "16 → 9 in the tower" in out
    assert json.loads(data.read_text())["images"][0]["groups"][0]["stage"] == "tower"
    assert Image.open(picture).size[0] > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "no/such/folder/x.png"], "there is no folder no/such/folder"),
        (["--out", "."], "is a folder"),
        (["--out", "x.docx"], "x.docx has no ending of a picture"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
        (["--out", ""], "the file to write has no name"),
        (["--out", "x.svg", "--json", "./x.svg"], "--out and --json name the same file, x.svg"),
        (["--visual-tokens", "999"], "Nothing to explain: visual_tokens=999 keeps all 16 patches; allowed: 1 to 15\n"),
    ],
)
def test_explain_refuses_in_one_line(capsys, folders, arguments, message):
    assert message in fails(capsys, "explain", "-m", folders.ivtp, "-i", folders.photo, "-p", "What?", *arguments)


@pytest.mark.slow
def test_explain_says_that_pruning_is_off(capsys, folders, shards):
    config = json.loads((shards / "config.json").read_text())
    config["pruning"]["enabled"] = False
    (shards / "config.json").write_text(json.dumps(config))
    assert "pruning is off" in fails(capsys, "explain", "-m", shards, "-i", folders.photo, "-p", "What?")


@pytest.mark.slow
def test_explain_finds_out_before_the_work_that_a_file_cannot_be_written(capsys, folders, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # who runs the tests may write everywhere
    arguments = ("-m", "no-such-model", "-i", folders.photo, "-p", "What?")
    assert "no permission to write x.json" in fails(capsys, "explain", *arguments, "--json", "x.json")


def test_explain_needs_a_picture(capsys, folders):
    assert "at least one --image" in fails(capsys, "explain", "-m", folders.ivtp, "-p", "What?")


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


def test_ctrl_c_at_a_question_exits_with_130(capsys, monkeypatch):
    def ask(*_, **__):
        typer.confirm("Upload?")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pushing, "push", ask)
    monkeypatch.setattr(f"{typer.confirm.__module__}.visible_prompt_func", stop)
    status, _, err = run(capsys, "push", "folder", "owner/name", "--yes")
    assert (status, err.strip()) == (130, "")


def test_ctrl_c_exits_with_130(capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert", stopped)
    assert run(capsys, "convert", "x", "--out", "y") == (130, "", "")


@pytest.mark.slow
def test_the_process_says_the_same():
    result = process("convert", "./no/where", "--out", "x", "--clip", "y", PYTHONWARNINGS="ignore")
    assert result.returncode == 1
    assert result.stdout == ""
    # Libraries that happen to be installed may say something of their own while they are imported.
    assert len([line for line in result.stderr.splitlines() if line.startswith("ivtp: ")]) == 1
    assert result.stderr.endswith("the name of a repository on the Hugging Face Hub\n")


def test_a_question_becomes_a_prompt(folders):
    processor = IVTPLlavaProcessor.from_pretrained(folders.ivtp)
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


def test_quality_is_a_command_like_the_others(capsys, tmp_path):
    assert "no checkpoint" in fails(capsys, "quality", "--model", tmp_path)
    assert "--rows" in fails(capsys, "quality", "--rows", "some")
    assert [rows.value for rows in quality.Rows] == list(evaluate_quality.ROWS)


def test_quality_outside_of_a_clone_says_where_it_is(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(quality, "__file__", str(tmp_path / "site-packages" / "ivtp_cli" / "quality.py"))
    assert "clone the repository" in fails(capsys, "quality")
    status, out, _ = run(capsys, "quality", "--help")
    assert status == 0
    assert "--questions" in out


@pytest.mark.slow
def test_results_tell_the_command_that_made_them(capsys, monkeypatch, tmp_path):
    asked = {}

    def evaluate(folder, out, **options):
        asked.update(options, folder=folder)
        (tmp_path / "results.md").write_text("the table")
        return tmp_path / "results.json"

    monkeypatch.setattr(evaluate_quality, "evaluate_checkpoint", evaluate)
    status, out, _ = run(capsys, "quality", "--tokens", 64, "--out", "some where")
    assert status == 0
    assert out.startswith("the table")
    assert asked["command"] == "ivtp quality --tokens 64 --out 'some where'"
    assert asked["folder"] == evaluate_quality.MINIATURE
    assert (asked["budgets"], asked["ablation_budgets"], asked["rows"]) == ([64], (64,), "main")
