"""Recipes: each is a configuration and back, names what it holds, and builds a checkpoint of exactly that."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration
from modeling_ivtp.checkpoints.convert import convert
from modeling_ivtp.checkpoints.recipes import load_recipe, recipe_names
from modeling_ivtp.checkpoints.stock import export_stock
from modeling_ivtp.checkpoints.weights import Checkpoint
from modeling_ivtp.checkpoints.writing import RECIPE_FILE
from modeling_ivtp.cli import main
from tests.support.checkpoints import PRUNING, clip_folder, llava_folder, sparse_llava

ROOT = Path(__file__).parents[2]
BUDGETS = (512, 256, 192, 128, 64, 32, 16)
CARDS = [
    f"{kind}-{model}"
    for kind in ("ivtp", "ivtp-extended")
    for model in ("llava-1.5-7b", "llava-1.5-13b", "llava-miniature")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A LLaVA, a CLIP that fits, and the two joined."""
    root = tmp_path_factory.mktemp("recipes")
    stock = llava_folder(root / "llava")
    (root / "llava" / "LICENSE.txt").write_text("terms of the weights")
    clip_folder(root / "clip", stock)
    convert(root / "llava", root / "clip", root / "joined", pruning=PRUNING, max_shard_size="100KB")
    return SimpleNamespace(root=root, stock=stock, llava=root / "llava", joined=root / "joined")


def test_every_checkpoint_has_every_budget() -> None:
    assert recipe_names() == sorted(f"{card}-{budget}" for card in CARDS for budget in BUDGETS)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_configuration_and_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert name == f"{recipe.card}-{recipe.pruning.visual_tokens}"
    assert (ROOT / "hub_cards" / recipe.card).is_dir()
    config = recipe.config()
    config.save_pretrained(tmp_path)
    again = IVTPLlavaConfig.from_pretrained(tmp_path)
    assert again.pruning == recipe.pruning
    plan = again.pruning_plan()
    assert plan is not None
    budget = recipe.pruning.visual_tokens
    assert (plan.tower[-1].keep, plan.decoder[-1].keep) == (min(576, round(1.875 * budget)), budget)
    stated = json.loads((ROOT / "configuration" / f"{name}.json").read_text())
    assert recipe.to_dict() | {"base_model": stated["base_model"]} == stated
    # What is published does not change with a default.
    assert set(stated["pruning"]) == set(recipe.pruning.to_dict())


@pytest.mark.slow
def test_the_miniature_is_built_by_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "configuration" / "ivtp-llava-miniature-32.json"
    assert main(["convert", "--recipe", str(recipe), "--out", str(tmp_path / "out"), "--no-progress"]) == 0
    assert "wrote" in capsys.readouterr().out
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.pruning == load_recipe("ivtp-llava-miniature-32").pruning
    noted = json.loads((tmp_path / "out" / RECIPE_FILE).read_text())
    assert (noted["recipe"], noted["card"], noted["base_model"]) == (
        "ivtp-llava-miniature-32",
        "ivtp-llava-miniature",
        None,
    )
    assert (tmp_path / "out" / "modeling_ivtp.py").is_file()
    AutoProcessor.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_options_beside_a_recipe_go_before_it(tmp_path: Path) -> None:
    arguments = ["convert", "--recipe", "ivtp-llava-miniature-64", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--visual-tokens", "48", "--dtype", "float32", "--no-progress"]) == 0
    config = IVTPLlavaConfig.from_pretrained(tmp_path / "out")
    assert (config.pruning.visual_tokens, config.pruning.layers_per_group) == (48, 2)
    assert config.dtype == torch.float32


@pytest.mark.slow
def test_a_recipe_takes_a_base_of_its_shape_and_no_other(
    tmp_path: Path, folders: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse_llava(tmp_path / "13b", "llava-1.5-13b")
    for base, said in (
        (
            tmp_path / "13b",
            "not of the shape llava-1.5-7b that recipe ivtp-llava-1.5-7b-64 is for: text_config.hidden_size",
        ),
        (folders.llava, "not of the shape llava-1.5-7b"),
    ):
        arguments = ["convert", str(base), "--recipe", "ivtp-llava-1.5-7b-64", "--out", str(tmp_path / "out")]
        assert main([*arguments, "--clip", str(folders.root / "clip")]) == 1
        message = capsys.readouterr().err
        assert said in message
        assert message.count("\n") == 1
        assert not (tmp_path / "out").exists()
    # The 13B base passes its own recipe's check, and then meets a CLIP that is not its tower's.
    arguments = ["convert", str(tmp_path / "13b"), "--recipe", "ivtp-llava-1.5-13b-64", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--clip", str(folders.root / "clip"), "--dry-run"]) == 1
    assert "1024" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"extra": 1}, "unknown field(s) extra"),
        (
            {"shape": "llava-2"},
            "shape='llava-2'; allowed: llava-1.5-13b, llava-1.5-7b, llava-tinyllama-1.1b, miniature, tiny",
        ),
        ({"dtype": "int8"}, "dtype='int8'; allowed: float16, bfloat16, float32"),
        ({"clip": 3}, "clip=3"),
        ({"pruning": {"visual_tokens": 0}}, "visual_tokens=0"),
        ({"pruning": {"layers_per_group": 5}}, "layers_per_group=5"),
        ({"pruning": {"tokens": 5}}, "Unknown pruning option(s) tokens"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    stated = json.loads((ROOT / "configuration" / "ivtp-llava-1.5-7b-64.json").read_text()) | change
    (tmp_path / "mine.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=r"mine\.json") as raised:
        load_recipe(tmp_path / "mine.json")
    assert said in str(raised.value)


def test_a_recipe_that_is_not_there_or_no_json(tmp_path: Path) -> None:
    message = (
        r"no recipe .ivtp-99.; allowed: a file, or one of ivtp-extended-llava-1\.5-13b-128, .*ivtp-llava-1\.5-13b-128"
    )
    with pytest.raises(ValueError, match=message):
        load_recipe("ivtp-99")
    for content, said in (("{", "is not JSON"), ("[]", "holds no JSON object"), ("{}", "missing field")):
        (tmp_path / "mine.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            load_recipe(tmp_path / "mine.json")
    with pytest.raises(ValueError, match="name the LLaVA to start from, or a recipe"):
        convert(None, None, tmp_path / "out")


def test_the_terms_of_the_weights_go_with_them(folders: Any) -> None:
    assert (folders.joined / "LICENSE.txt").read_text() == "terms of the weights"


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", ["as converted", "as the model saves them", "as a new model saves them", "of the modules"]
)
def test_without_our_extras_a_folder_is_an_official_llava(tmp_path: Path, folders: Any, names: str) -> None:
    source = folders.joined
    if names != "as converted":
        source = tmp_path / "saved"
        shutil.copytree(folders.joined, source, ignore=shutil.ignore_patterns("*.safetensors*"))
        model = IVTPLlavaForConditionalGeneration.from_pretrained(folders.joined)
        if names == "as a new model saves them":
            trained = IVTPLlavaForConditionalGeneration(model.config)
            trained.load_state_dict(model.state_dict())
            trained.save_pretrained(source)
            assert "vision_tower.embeddings.class_embedding" in load_file(source / "model.safetensors")
        elif names == "as the model saves them":
            model.save_pretrained(source)
        else:  # sharded training saves the state of the modules
            save_file(model.state_dict(), source / "model.safetensors", {"format": "pt"})
    result = export_stock(source, tmp_path / "stock", max_shard_size="100KB")
    assert result.llava_tensors == len(folders.stock.state_dict())
    # The names of llava-hf's folders, which other software looks for.
    official = set(load_file(folders.llava / "model.safetensors"))
    assert set(Checkpoint.from_folder(tmp_path / "stock", "stock").tensors) == official
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava", ["LlavaForConditionalGeneration"])
    text = (tmp_path / "stock" / "config.json").read_text() + (tmp_path / "stock" / "processor_config.json").read_text()
    assert not [word for word in ("ivtp", "auto_map", "clip_text", "pruning", "clip_tokenizer") if word in text.lower()]
    assert not list((tmp_path / "stock").glob("*.py"))
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in folders.stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    processor = AutoProcessor.from_pretrained(tmp_path / "stock")
    assert type(processor).__name__ == "LlavaProcessor"
    assert (tmp_path / "stock" / "LICENSE.txt").is_file()


def test_recipes_without_their_base_are_not_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package has no miniature beside it."""
    shutil.copytree(ROOT / "configuration", tmp_path / "configuration")
    monkeypatch.setattr("modeling_ivtp.checkpoints.recipes.shipped", lambda name: tmp_path / name)
    assert {name.rpartition("-")[0] for name in recipe_names()} == {card for card in CARDS if "miniature" not in card}


@pytest.mark.slow
def test_the_way_back_refuses_what_makes_no_sense(
    tmp_path: Path, folders: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "--stock", "--out", str(tmp_path / "out")]) == 1
    assert "--stock needs the folder" in capsys.readouterr().err
    wrong = [
        "convert",
        str(folders.joined),
        "--stock",
        "--clip",
        "x",
        "--visual-tokens",
        "3",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(wrong) == 1
    assert "leave out --clip, visual_tokens" in capsys.readouterr().err
    assert main(["convert", str(folders.llava), "--stock", "--out", str(tmp_path / "out")]) == 1
    assert "is a stock LLaVA already" in capsys.readouterr().err
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert main(["convert", str(tmp_path), "--stock", "--out", str(tmp_path / "out")]) == 1
    assert "has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
