"""Folders of trained pruners: what is saved comes back, what does not fit is refused, the base is left alone."""

import copy
import errno
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from modeling_ivtp import trained
from tests.support.checkpoints import llava_folder
from tests.support.tiny import prompt, tiny_model
from tests.support.trained import ROWS, answered, assert_same_bits, bits, ready


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def folder(model, tmp_path):
    ready(trained.LVPruning(ratio=0.6, heads=4, text="all"), model).save(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def test_what_is_saved_comes_back_and_decides_the_same(model, folder):
    method, loaded = ready(trained.LVPruning(ratio=0.6, heads=4, text="all"), model), trained.load(folder)
    assert loaded == method
    assert loaded.base == method.base
    assert not loaded.learned.training
    saved = method.learned.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.learned.state_dict().items())
    with method(model):
        expected = model(**prompt(ROWS)).logits
    with loaded(model):
        assert torch.equal(model(**prompt(ROWS)).logits, expected)
    with trained.load(folder, keep=2, text="prompt")(model):
        assert model.model.plan().final_tokens == 2
    assert trained.load(folder, dtype=torch.bfloat16).learned[0].scores.weight.dtype == torch.bfloat16
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@torch.no_grad()
def test_the_base_is_bit_equal_before_during_and_after(model, folder):
    before, classes = bits(model), [type(module) for module in model.modules()]
    stock = model(**prompt(ROWS)).logits
    method = trained.load(folder)
    with method(model):
        assert_same_bits(model, before)
        assert not torch.equal(model.generate(**prompt(ROWS), max_new_tokens=2), stock)
        assert_same_bits(model, before)
    assert_same_bits(model, before)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(**prompt(ROWS)).logits, stock)


@torch.no_grad()
def test_a_stock_llava_is_pruned_and_left_as_it_was(tmp_path):
    model = llava_folder(tmp_path / "llava")
    method = ready(trained.LVPruning(ratio=0.6), model)
    before, kind = bits(model), type(model)
    config = model.config
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    ids = torch.tensor([[1, *[config.image_token_id] * patches, 5, 6]])
    pixels = torch.randn(1, 3, config.vision_config.image_size, config.vision_config.image_size)
    inputs = {"input_ids": ids, "pixel_values": pixels}
    stock = model(**inputs).logits
    with method(model):
        pruned = model(**inputs)
        assert pruned.past_key_values.layers[-1].keys.shape[2] < ids.shape[1]
    assert type(model) is kind
    assert_same_bits(model, before)
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 64}, "this model has hidden_size=64; allowed: 32"),
        ({"decoder": "qwen2"}, "this model has model_type='qwen2'; allowed: 'llama'"),
        ({"seed": 5}, "embeddings are not those of the adapter's base"),
    ],
    ids=str,
)
def test_another_base_is_refused(folder, other, message):
    stranger = tiny_model(**other)
    before = bits(stranger)
    with pytest.raises(ValueError, match="lvpruning") as error, trained.load(folder)(stranger):
        pass
    assert message.replace("'", "") in str(error.value).replace("'", "")
    assert stranger.model.applied_pruner is None
    assert_same_bits(stranger, before)


def test_another_depth_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["base"]["num_hidden_layers"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_hidden_layers=6; allowed: 8"), trained.load(folder)(tiny_model()):
        pass


def test_a_fine_tuned_base_in_half_precision_is_accepted(folder, model):
    other = tiny_model().to(torch.bfloat16)
    with torch.no_grad():
        other.lm_head.weight.add_(0.1)
    with trained.load(folder)(other):
        assert other.model.plan() is not None


@pytest.mark.parametrize("part", ["language_model", "lm_head", "multi_modal_projector"])
def test_modules_that_were_trained_together_with_a_model_fit_no_other(part, tmp_path):
    untrained, tuned = tiny_model(), tiny_model()
    with trained.PrunerTraining(tuned, ready(trained.LVPruning(ratio=0.6), tuned), learns=(part,)) as training:
        optimizer = torch.optim.AdamW(training.parameter_groups(1e-3, 3e-3))
        training.train()(**answered()).loss.backward()
        optimizer.step()
        training.save(tmp_path / "adapter")
    method = trained.load(tmp_path / "adapter")
    for model in (tuned, copy.deepcopy(tuned).to(torch.bfloat16), copy.deepcopy(tuned).half()):
        with method(model):
            assert model.model.plan() is not None
    with pytest.raises(ValueError, match=f"this model's {part} is not the one that was trained together with the mod"):
        method(untrained)
    assert untrained.model.applied_pruner is None


def test_a_local_folder_s_path_stays_here_and_a_name_on_the_hub_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained(tmp_path / "models" / "mine")
    for source, expected in (
        (str(tmp_path / "models" / "mine"), ""),
        ("models/mine", ""),
        ("owner/name", "owner/name"),
    ):
        model = tiny_model()
        model.config._name_or_path = source
        trained.LVPruning(ratio=0.6).for_model(model).save(tmp_path / "adapter", overwrite=True)
        config = (tmp_path / "adapter" / "config.json").read_text()
        assert json.loads(config)["base"]["name_or_path"] == expected
        assert "mine" not in config


def test_without_modules_nothing_is_applied_or_saved(model, tmp_path):
    for act in (lambda: trained.LVPruning(ratio=0.6)(model), lambda: trained.LVPruning(ratio=0.6).save(tmp_path / "x")):
        with pytest.raises(ValueError, match="lvpruning has no modules"):
            act()
    assert not (tmp_path / "x").exists()


def damaged(folder, how):
    config, weights = folder / "config.json", folder / "model.safetensors"
    note = json.loads(config.read_text())
    if how == "no config":
        config.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "no JSON":
        config.write_text("{")
    elif how == "a list":
        config.write_text("[]")
    elif how == "no pruner":
        config.write_text(json.dumps({"model_type": "llava"}))
    elif how == "another format":
        config.write_text(json.dumps(note | {"format": 9}))
    elif how == "an unknown option":
        config.write_text(json.dumps(note | {"options": {"ration": 0.5}}))
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:100])
    elif how == "other modules":
        config.write_text(json.dumps(note | {"options": note["options"] | {"blocks": 3}}))
    elif how == "another shape":
        tensors = load_file(weights)
        save_file({name: tensor[..., :1].clone() for name, tensor in tensors.items()}, weights)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("no config", FileNotFoundError, "has no config.json"),
        ("no weights", FileNotFoundError, "has no model.safetensors"),
        ("no JSON", ValueError, "config.json is no JSON"),
        ("a list", ValueError, "config.json holds list; allowed: an object"),
        ("no pruner", ValueError, "pruner=None in config.json; allowed: lvpruning"),
        ("another format", ValueError, "format=9 in config.json; allowed: 1"),
        ("an unknown option", ValueError, "lvpruning has no option ration; allowed: keep"),
        ("cut short", ValueError, "model.safetensors is damaged or cut short"),
        ("other modules", ValueError, "does not fit its config.json: 0.blocks.2"),
        ("another shape", ValueError, "does not fit its config.json: 0.blocks.0"),
    ],
)
def test_a_damaged_folder_is_named(folder, how, error, message):
    damaged(folder, how)
    with pytest.raises(error) as raised:
        trained.load(folder)
    assert message in str(raised.value)


def test_an_unknown_option_or_an_occupied_folder_is_refused(folder, model):
    with pytest.raises(ValueError, match="lvpruning has no option ration; allowed: keep"):
        trained.load(folder, ration=0.5)
    with pytest.raises(ValueError, match="ratio=3; allowed: from 0 to 1"):
        trained.load(folder, ratio=3)
    method = trained.load(folder, ratio=0.5)
    with pytest.raises(FileExistsError, match="is not empty"):
        method.save(folder)
    method.save(folder, overwrite=True)
    assert trained.load(folder).ratio == 0.5


@pytest.mark.parametrize("when", ["before", "in the middle", "in the middle, as safetensors says it"])
def test_a_full_disk_leaves_what_was_saved_before_and_nothing_half_written(when, folder, tmp_path, monkeypatch):
    method, before = trained.load(folder, ratio=0.5), {path: path.read_bytes() for path in folder.iterdir()}
    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    else:

        def half(weights, path, **_):
            path.write_bytes(b"half")
            if "safetensors" in when:
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(trained.adapter, "save_file", half)
    for target, overwrite in ((folder, True), (tmp_path / "new", False)):
        with pytest.raises(OSError, match=r"needs .* free|no room left on the disk") as error:
            method.save(target, overwrite=overwrite)
        assert error.value.errno == errno.ENOSPC
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


def test_a_method_is_made_by_name_or_folder(folder):
    assert trained.make("fastv").keep == 64
    assert trained.make(str(folder)).ratio == 0.6
    assert (trained.make(str(folder), 3).keep, trained.make(str(folder), 3).ratio) == (3, None)
    with pytest.raises(ValueError, match="Unknown method 'fastw'; allowed: random"):
        trained.make("fastw")
