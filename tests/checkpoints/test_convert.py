"""`convert` joins LLaVA and CLIP without changing a bit of either, and leaves nothing behind when it cannot."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration, IVTPLlavaProcessor
from modeling_ivtp.checkpoints import convert as conversion
from modeling_ivtp.checkpoints import shards
from modeling_ivtp.checkpoints.clip_checkpoint import load_clip_text
from modeling_ivtp.checkpoints.convert import convert
from modeling_ivtp.checkpoints.stock import export_stock
from modeling_ivtp.checkpoints.weights import Checkpoint
from tests.support.checkpoints import PRUNING, clip_folder, llava_folder, open_clip_file
from tests.support.text_tokenizers import clip_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sources that every test reads and none changes."""
    root = tmp_path_factory.mktemp("sources")
    stock = llava_folder(root / "llava")
    clip_folder(root / "clip", stock)
    open_clip_file(root / "clip.safetensors")
    return SimpleNamespace(root=root, llava=root / "llava", clip=root / "clip", stock=stock)


@pytest.fixture
def parent(tmp_path):
    path = tmp_path / "parent"
    path.mkdir()
    return path


def load(folder, **options):
    model, info = IVTPLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def assert_same_weights(model, stock, clip):
    ours = model.state_dict()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(ours.pop(name), tensor), name
    theirs = {f"model.{name}": tensor for name, tensor in load_clip_text(clip).tensors()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize("shards", ["5GB", "100KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen2"])
def test_llava_and_clip_arrive_bit_by_bit(tmp_path, folders, decoder, shards):
    stock = llava_folder(tmp_path / "llava", decoder=decoder, max_shard_size=shards)
    result = convert(tmp_path / "llava", folders.clip, tmp_path / "out", max_shard_size=shards, pruning=PRUNING)
    assert (len(result.weight_files) > 2) == (shards != "5GB")
    model = load(tmp_path / "out")
    assert_same_weights(model, stock, folders.clip)
    assert model.config.pruning.visual_tokens == 4
    assert result.total_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert result.llava_tensors == len(stock.state_dict())
    assert result.clip_tensors == len(load_clip_text(folders.clip).shapes)


@pytest.mark.slow
def test_the_folder_is_that_of_the_model_and_processor(tmp_path, folders):
    convert(folders.llava, folders.clip, tmp_path / "out", pruning=PRUNING)
    load(tmp_path / "out").save_pretrained(tmp_path / "saved")
    IVTPLlavaProcessor.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "saved"))
    config, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "saved"))
    assert config == saved
    assert config["model_type"] == "ivtp_llava"
    assert config["architectures"] == ["IVTPLlavaForConditionalGeneration"]
    assert "AutoModelForImageTextToText" in config["auto_map"]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_length"] == 77


@pytest.mark.slow
def test_llavas_own_names_are_kept(tmp_path, folders):
    convert(folders.llava, folders.clip, tmp_path / "out", pruning=PRUNING)
    names = set(Checkpoint.from_folder(tmp_path / "out", "out").tensors)
    assert set(load_file(folders.llava / "model.safetensors")) <= names
    assert {name.split(".")[1] for name in names if name.startswith("model.")} == {
        "clip_text_model",
        "visual_projection",
    }


@pytest.mark.slow
def test_it_answers_as_stock_llava_does_with_pruning_off(tmp_path, folders):
    convert(folders.llava, folders.clip, tmp_path / "out", pruning=PRUNING)
    model, processor = load(tmp_path / "out"), IVTPLlavaProcessor.from_pretrained(tmp_path / "out")
    image = Image.effect_noise((80, 60), 90).convert("RGB")
    inputs = processor(images=image, text="USER: <image>\nWhich animal is this? ASSISTANT:", return_tensors="pt")
    assert inputs["clip_input_ids"].shape[-1] == 20
    options = {"max_new_tokens": 4, "do_sample": False}
    with model.pruning(enabled=False):
        unpruned = model.generate(**inputs, **options)
    stock_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert torch.equal(unpruned, folders.stock.generate(**stock_inputs, **options))
    assert model.generate(**inputs, **options).shape == unpruned.shape


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the vision tower of")
def test_from_llava_and_convert_give_the_same_model(tmp_path, folders):
    convert(folders.llava, folders.root / "clip.safetensors", tmp_path / "out", pruning=PRUNING)
    joined = IVTPLlavaForConditionalGeneration.from_llava(
        folders.llava, clip=folders.root / "clip.safetensors", pruning=PRUNING
    ).state_dict()
    converted = load(tmp_path / "out").state_dict()
    assert joined.keys() == converted.keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in converted.items())


@pytest.mark.slow
def test_dtypes(tmp_path, folders):
    stock = llava_folder(tmp_path / "half", dtype=torch.float16)
    result = convert(tmp_path / "half", folders.clip, tmp_path / "kept", pruning=PRUNING)
    kept = load(tmp_path / "kept", dtype="auto")
    assert result.dtype == kept.dtype == torch.float16
    assert {tensor.dtype for tensor in kept.state_dict().values()} == {torch.float16}
    name = "model.language_model.embed_tokens.weight"
    assert torch.equal(kept.state_dict()[name], stock.state_dict()[name])

    convert(tmp_path / "half", folders.clip, tmp_path / "cast", dtype="bfloat16", pruning=PRUNING)
    infos = Checkpoint.from_folder(tmp_path / "cast", "cast").tensors.values()
    assert {info.dtype for info in infos} == {torch.bfloat16}
    assert load(tmp_path / "cast", dtype="auto").dtype == torch.bfloat16


@pytest.mark.slow
def test_one_of_ours_is_converted_again(tmp_path, folders):
    convert(folders.llava, folders.clip, tmp_path / "first", pruning=PRUNING)
    convert(tmp_path / "first", None, tmp_path / "second", pruning={"visual_tokens": 3})
    assert_same_weights(load(tmp_path / "second"), folders.stock, folders.clip)
    assert IVTPLlavaConfig.from_pretrained(tmp_path / "second").pruning.to_dict() == {
        **IVTPLlavaConfig.from_pretrained(tmp_path / "first").pruning.to_dict(),
        "visual_tokens": 3,
    }
    # What the model itself saves has other names for the same weights.
    load(tmp_path / "first").save_pretrained(tmp_path / "saved")
    IVTPLlavaProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "saved")
    other = tmp_path / "other"
    clip_folder(other, hidden_act="gelu")
    with pytest.warns(UserWarning, match="is not that of"):
        convert(tmp_path / "saved", other, tmp_path / "third")
    assert_same_weights(load(tmp_path / "third"), folders.stock, other)


@pytest.mark.slow
def test_a_saved_folder_keeps_its_pruning_options_and_a_stock_one_asks_for_its_clip(tmp_path, folders):
    """The default options fit neither tower here: 3 layers per group, of 4."""
    convert(folders.llava, folders.clip, tmp_path / "first", pruning=PRUNING)
    model, processor = load(tmp_path / "first"), IVTPLlavaProcessor.from_pretrained(tmp_path / "first")
    model.set_pruning(visual_tokens=3)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", None, tmp_path / "second")
    assert IVTPLlavaConfig.from_pretrained(tmp_path / "second").pruning == model.pruning_config
    export_stock(tmp_path / "saved", tmp_path / "stock")
    for source in (tmp_path / "stock", folders.llava):
        with pytest.raises(ValueError, match="has no text tower of CLIP; name a CLIP"):
            convert(source, None, tmp_path / "third")


@pytest.mark.slow
def test_one_tensor_is_in_memory_at_a_time(tmp_path, folders, monkeypatch):
    alive, most, original = weakref.WeakSet(), [], Checkpoint.read

    def counted(self, name):
        most.append(len(alive))
        tensor = original(self, name)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    convert(folders.llava, folders.clip, tmp_path / "out", pruning=PRUNING)
    assert len(most) > 100
    assert max(most) <= 1


@pytest.mark.slow
def test_a_dry_run_writes_nothing_and_tells_the_truth(parent, folders):
    options = {"dtype": "float16", "max_shard_size": "100KB", "pruning": PRUNING}
    plan = convert(folders.llava, folders.clip, parent / "out", dry_run=True, **options)
    assert os.listdir(parent) == []
    assert not plan.written
    done = convert(folders.llava, folders.clip, parent / "out", **options)
    assert done.written
    assert plan.weight_files == done.weight_files
    assert (plan.out, plan.dtype, plan.llava_tensors) == (done.out, done.dtype, done.llava_tensors)


def test_a_dry_run_of_hub_repositories_downloads_headers_alone(parent, folders, monkeypatch):
    from modeling_ivtp.checkpoints import sources

    small = parent.parent / "small"
    asked = []

    def snapshot(repo, allow_patterns, **options):
        asked.extend(allow_patterns)
        source = folders.llava if repo == "owner/llava" else folders.clip
        shutil.copytree(source, small / repo, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        return str(small / repo)

    def headers(self, repo, **options):
        tensors = load_file((folders.llava if repo == "owner/llava" else folders.clip) / "model.safetensors")
        names = {torch.float32: "F32", torch.float16: "F16"}
        infos = {
            name: SimpleNamespace(dtype=names[tensor.dtype], shape=tensor.shape) for name, tensor in tensors.items()
        }
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=infos)})

    monkeypatch.setattr(sources.HubOptions, "check", lambda *_: None)
    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    monkeypatch.setattr(sources.HfApi, "get_safetensors_metadata", headers)
    plan = convert("owner/llava", "owner/clip", parent / "out", dry_run=True, pruning=PRUNING)
    assert not any("safetensors" in pattern for pattern in asked)
    local = convert(folders.llava, folders.clip, parent / "out", dry_run=True, pruning=PRUNING)
    assert plan.weight_files == local.weight_files
    assert os.listdir(parent) == []


def copied(source, target, **config):
    shutil.copytree(source, target)
    stated = json.loads((target / "config.json").read_text())
    for name, value in config.items():
        part, _, key = name.rpartition("__")
        (stated[part] if part else stated)[key] = value
    (target / "config.json").write_text(json.dumps(stated))
    return target


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava_next"}, "model_type 'llava_next'; supported are llava, ivtp_llava"),
        ({"model_type": "llava_llama"}, "llava-hf repository"),
        ({"vision_config__model_type": "siglip_vision_model"}, "'siglip_vision_model'.* CLS token"),
        ({"text_config__model_type": "gpt2"}, "'gpt2'; supported are llama, mistral, qwen2"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
        ({"vision_config__hidden_size": 128}, "64 wide, that of .* is 128"),
        ({"vision_config__num_hidden_layers": 3}, r"16 tensors that the model does not know"),
        (
            {"text_config__num_hidden_layers": 5},
            r"lacks 9 tensors of the model, such as model\.language_model\.layers\.4",
        ),
        (
            {"text_config__vocab_size": 2000},
            r"2 tensors of other shapes.* lm_head\.weight: \(\d+, 32\) in the weights, \(2000, 32\) by config\.json",
        ),
        ({"text_config": 5}, "source cannot be read .*'text_config'"),
        ({"text_config__hidden_size": "wide"}, "source cannot be read .*'hidden_size'"),
    ],
)
def test_a_llava_that_cannot_be_joined_is_refused(parent, tmp_path, folders, config, message):
    source = copied(folders.llava, tmp_path / "source", **config)
    with pytest.raises(ValueError, match=message):
        convert(source, folders.clip, parent / "out", pruning={"decoder_layers": 2, "layers_per_group": 1})
    assert os.listdir(parent) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip": None}, ValueError, "has no text tower of CLIP"),
        ({"clip": "nobody/../x"}, OSError, "neither a folder here nor"),
        ({"llava": "./nothing"}, OSError, "neither a folder here nor"),
        ({"dtype": "int4"}, ValueError, "dtype='int4'; allowed: float32, float16, bfloat16"),
        ({"max_shard_size": "5 apples"}, ValueError, "max_shard_size='5 apples'; allowed"),
        ({"max_shard_size": 0}, ValueError, "max_shard_size=0; allowed"),
        ({"pruning": {"visual_tokens": 0}}, ValueError, "visual_tokens=0"),
        ({"pruning": {"tokens": 3}}, ValueError, "tokens"),
        ({"pruning": {"decoder_layers": 99}}, ValueError, "99"),
        ({"activation": "nonsense", "clip": "file"}, ValueError, "nonsense"),
    ],
)
def test_options_that_cannot_be_are_refused(parent, folders, options, error, message):
    options = {"llava": folders.llava, "clip": folders.clip, "pruning": PRUNING, **options}
    if options["clip"] == "file":
        options["clip"] = folders.root / "clip.safetensors"
    with pytest.raises(error, match=message):
        convert(options.pop("llava"), options.pop("clip"), parent / "out", **options)
    assert os.listdir(parent) == []


def test_the_source_is_never_overwritten(folders):
    for out in (folders.llava, folders.root, folders.clip):
        with pytest.raises(ValueError, match="is read from"):
            convert(folders.llava, folders.clip, out, overwrite=True)


def test_a_folder_that_is_there_stays_unless_told_otherwise(parent, folders):
    (parent / "out").mkdir()
    (parent / "out" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        convert(folders.llava, folders.clip, parent / "out", pruning=PRUNING)
    convert(folders.llava, folders.clip, parent / "out", overwrite=True, pruning=PRUNING)
    assert not (parent / "out" / "precious").exists()
    load(parent / "out")


def test_a_truncated_shard_is_named(parent, tmp_path, folders):
    llava_folder(tmp_path / "llava", max_shard_size="100KB")
    shard = sorted((tmp_path / "llava").glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(OSError, match=f"{shard.name} is truncated"):
        convert(tmp_path / "llava", folders.clip, parent / "out", pruning=PRUNING)
    assert os.listdir(parent) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff\xfe"], ids=["list", "cut short", "no text"])
def test_a_damaged_small_file_is_named(parent, tmp_path, folders, name, content):
    source = copied(folders.llava, tmp_path / "source")
    (source / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=re.escape(str(source / name))):
        convert(source, folders.clip, parent / "out", pruning=PRUNING)
    assert os.listdir(parent) == []


@pytest.mark.slow
def test_one_of_ours_without_clips_tokenizer_asks_for_a_clip(parent, tmp_path, folders):
    convert(folders.llava, folders.clip, tmp_path / "ours", pruning=PRUNING)
    shutil.rmtree(tmp_path / "ours" / "clip_tokenizer")
    with pytest.raises(ValueError, match="ours has no clip_tokenizer/; name the CLIP"):
        convert(tmp_path / "ours", None, parent / "out")
    assert os.listdir(parent) == []
    convert(tmp_path / "ours", folders.clip, parent / "out")
    assert (parent / "out" / "clip_tokenizer").is_dir()


@pytest.mark.slow
def test_a_full_disk_is_noticed_beforehand(parent, folders, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for dry_run in (True, False):
        with pytest.raises(OSError, match="but only 1 KB are free"):
            convert(folders.llava, folders.clip, parent / "out", dry_run=dry_run, pruning=PRUNING)
    assert os.listdir(parent) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_stop_in_the_middle_leaves_nothing(parent, folders, monkeypatch, error):
    original, calls = Checkpoint.read, []

    def read(self, name):
        calls.append(name)
        if len(calls) == 40:
            assert len(os.listdir(parent)) == 1
            raise error
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "read", read)
    with pytest.raises(type(error), match="no room left" if isinstance(error, OSError) else None):
        convert(folders.llava, folders.clip, parent / "out", pruning=PRUNING)
    assert os.listdir(parent) == []


def test_a_wrong_result_is_thrown_away(parent, folders, monkeypatch):
    original = shards.write_safetensors

    def forgetful(path, tensors, *rest):
        original(path, dict(list(tensors.items())[1:]), *rest)

    monkeypatch.setattr(shards, "write_safetensors", forgetful)
    with pytest.raises(OSError, match="not those that were written"):
        convert(folders.llava, folders.clip, parent / "out", pruning=PRUNING)
    assert os.listdir(parent) == []


SLOW = """
import sys, time
from modeling_ivtp.checkpoints import convert as conversion
from modeling_ivtp.checkpoints.weights import Checkpoint
original, calls = Checkpoint.read, []
def read(self, name):
    calls.append(name)
    if len(calls) == 40:
        print("writing", flush=True)
        time.sleep(30)
    return original(self, name)
Checkpoint.read = read
conversion.convert(*sys.argv[1:], pruning={"decoder_layers": 4, "layers_per_group": 2})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_in_the_middle_leaves_nothing(parent, folders, number, status):
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, folders.llava, folders.clip, parent / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(conversion.__file__).parents[2],
        # Tests that run under nohup hand their deafness down.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == b"writing\n"
        assert len(os.listdir(parent)) == 1
        process.send_signal(number)
        assert process.wait(20) == status
    assert os.listdir(parent) == []


def test_a_text_tower_of_another_clip_is_noticed(tmp_path, folders):
    clip_folder(tmp_path / "clip")
    with pytest.warns(UserWarning, match="is not that of .*clip"):
        convert(folders.llava, tmp_path / "clip", tmp_path / "out", pruning=PRUNING)


@pytest.mark.slow
def test_buffers_of_older_libraries_are_left_out(tmp_path, folders):
    shutil.copytree(folders.llava, tmp_path / "llava")
    tensors = load_file(tmp_path / "llava" / "model.safetensors")
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, tmp_path / "llava" / "model.safetensors")
    convert(tmp_path / "llava", folders.clip, tmp_path / "out", pruning=PRUNING)
    load(tmp_path / "out")


@pytest.mark.slow
def test_clips_own_tokenizer_travels_along(tmp_path, folders):
    shutil.copytree(folders.clip, tmp_path / "clip")
    clip_tokenizer().save_pretrained(tmp_path / "clip")
    convert(folders.llava, tmp_path / "clip", tmp_path / "out", pruning=PRUNING)
    tokenizer = IVTPLlavaProcessor.from_pretrained(tmp_path / "out").clip_tokenizer
    assert tokenizer("a red bus").input_ids == clip_tokenizer()("a red bus").input_ids
    assert tokenizer.model_max_length == 20


@pytest.mark.slow
def test_stock_transformers_reads_the_source_it_was_made_from(folders):
    _, info = LlavaForConditionalGeneration.from_pretrained(folders.llava, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
