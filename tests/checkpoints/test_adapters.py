"""A folder or repository with a LoRA adapter alone is named wherever a whole model is asked for."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel

from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration, IVTPLlavaModel, IVTPLlavaProcessor
from modeling_ivtp.checkpoints.convert import convert
from modeling_ivtp.checkpoints.sources import HubOptions, open_checkpoint
from modeling_ivtp.checkpoints.stock import export_stock
from modeling_ivtp.model import adapter
from modeling_ivtp.publish.staging import stage
from modeling_ivtp.serving.answering import load_model
from tests.support.checkpoints import PRUNING, clip_folder, llava_folder
from tests.support.hub_server import running_hub

MESSAGE = r"is a LoRA adapter of .*ours, not a whole model: merge it first, .*merge_and_unload\(\)"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LLaVA, a CLIP, the two joined, and an adapter of that."""
    root = tmp_path_factory.mktemp("adapters")
    clip_folder(root / "clip", llava_folder(root / "llava"))
    convert(root / "llava", root / "clip", root / "ours", pruning=PRUNING)
    torch.manual_seed(0)
    adapted = get_peft_model(
        IVTPLlavaForConditionalGeneration.from_pretrained(root / "ours"),
        LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False),
    )
    adapted.save_pretrained(root / "lora")
    return SimpleNamespace(**{name: root / name for name in ("llava", "clip", "ours", "lora")}, adapted=adapted)


def from_llava(folders, out):
    IVTPLlavaForConditionalGeneration.from_llava(folders.lora, clip=folders.clip, pruning=PRUNING)


DOORS = {
    "from_llava": from_llava,
    "clip of from_llava": lambda folders, out: IVTPLlavaForConditionalGeneration.from_llava(
        folders.llava, clip=folders.lora, pruning=PRUNING
    ),
    "config": lambda folders, out: IVTPLlavaConfig.from_pretrained(folders.lora),
    "convert": lambda folders, out: convert(folders.lora, folders.clip, out),
    "clip of convert": lambda folders, out: convert(folders.llava, folders.lora, out, pruning=PRUNING),
    "convert --stock": lambda folders, out: export_stock(folders.lora, out),
    "push": lambda folders, out: stage(folders.lora, "owner/name", out),
    "generate, explain, serve": lambda folders, out: load_model(folders.lora),
    "batch, bench": lambda folders, out: open_checkpoint(folders.lora, HubOptions()),
    "processor": lambda folders, out: IVTPLlavaProcessor.from_pretrained(folders.lora),
    "processor's from_llava": lambda folders, out: IVTPLlavaProcessor.from_llava(folders.lora),
    "clip of the processor": lambda folders, out: IVTPLlavaProcessor.from_llava(folders.llava, folders.lora),
}


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_an_adapter_is_no_whole_model(folders, tmp_path, door):
    with pytest.raises((OSError, ValueError), match=MESSAGE):
        DOORS[door](folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_nothing_is_no_7b_model(tmp_path):
    with pytest.raises(OSError, match=r"has no config\.json"):
        IVTPLlavaConfig.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"has no config\.json"):
        IVTPLlavaForConditionalGeneration.from_llava(tmp_path)


@pytest.mark.slow
def test_the_way_that_the_message_tells_works(folders, tmp_path):
    base = IVTPLlavaForConditionalGeneration.from_pretrained(folders.ours)
    PeftModel.from_pretrained(base, folders.lora).merge_and_unload().save_pretrained(tmp_path / "merged")
    IVTPLlavaProcessor.from_pretrained(folders.ours).save_pretrained(tmp_path / "merged")
    merged = IVTPLlavaForConditionalGeneration.from_llava(tmp_path / "merged").state_dict()
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(
        merged[name], IVTPLlavaForConditionalGeneration.from_pretrained(folders.ours).state_dict()[name]
    )
    convert(tmp_path / "merged", None, tmp_path / "converted")


def test_transformers_own_way_to_load_an_adapter_stays(folders):
    """`from_pretrained` loads the base and puts the adapter on top."""
    model = IVTPLlavaForConditionalGeneration.from_pretrained(folders.lora)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert AutoConfig.from_pretrained(folders.ours).model_type == "ivtp_llava"


@pytest.mark.slow
@pytest.mark.parametrize("door", ["from_llava", "generate, explain, serve", "convert", "push"])
def test_an_adapter_with_its_bases_configuration_is_no_whole_model(folders, tmp_path, door):
    shutil.copytree(folders.lora, tmp_path / "lora")
    shutil.copyfile(folders.ours / "config.json", tmp_path / "lora" / "config.json")
    with pytest.raises((OSError, ValueError), match=MESSAGE):
        DOORS[door](SimpleNamespace(**vars(folders) | {"lora": tmp_path / "lora"}), tmp_path / "out")


@pytest.mark.parametrize("error", [LocalEntryNotFoundError, OfflineModeIsEnabled])
def test_a_repository_out_of_reach_is_asked_for_no_second_file(monkeypatch, error):
    def refused(*args, **kwargs):
        raise AssertionError("asked again")

    monkeypatch.setattr(adapter, "find_adapter_config_file", refused)
    with pytest.raises(OSError, match="as transformers says it"), adapter.naming_adapter("owner/model"):
        raise OSError("as transformers says it") from error("not there")
    with pytest.raises(AssertionError, match="asked again"), adapter.naming_adapter("owner/model"):
        raise OSError("a file is missing")


@pytest.mark.slow
def test_a_bare_models_folder_has_no_head(folders, tmp_path):
    IVTPLlavaForConditionalGeneration.from_pretrained(folders.ours).model.save_pretrained(tmp_path)
    for load in (IVTPLlavaForConditionalGeneration.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=r"has no lm_head\.weight: it was saved from a bare model.*IVTPLlavaModel"):
            load(tmp_path)
    bare = IVTPLlavaModel.from_pretrained(tmp_path)
    whole = IVTPLlavaForConditionalGeneration.from_pretrained(folders.ours).model.state_dict()
    assert all(torch.equal(weight, whole[name]) for name, weight in bare.state_dict().items())
    _, info = IVTPLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert "lm_head.weight" in info["missing_keys"]


@pytest.mark.slow
def test_a_whole_model_with_an_adapter_beside_it_is_a_whole_model(folders, tmp_path):
    shutil.copytree(folders.ours, tmp_path / "both")
    for file in folders.lora.glob("adapter_*"):
        shutil.copyfile(file, tmp_path / "both" / file.name)
    convert(tmp_path / "both", None, tmp_path / "out")
    found, whole = (
        IVTPLlavaForConditionalGeneration.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "out", folders.ours)
    )
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], weight) for name, weight in whole.items())


ON_THE_HUB = """
import json
from modeling_ivtp import IVTPLlavaForConditionalGeneration, IVTPLlavaProcessor
from modeling_ivtp.checkpoints.convert import convert
from modeling_ivtp.checkpoints.stock import export_stock
messages = []
for door in (
    lambda: IVTPLlavaForConditionalGeneration.from_llava("owner/lora"),
    lambda: IVTPLlavaProcessor.from_llava("owner/lora"),
    lambda: convert("owner/lora", None, "out", dry_run=True),
    lambda: export_stock("owner/lora", "out"),
    lambda: export_stock("owner/lora", "out", dry_run=True),
):
    try:
        door()
    except (OSError, ValueError) as error:
        messages.append(str(error))
print(json.dumps(messages))
"""


@pytest.mark.slow
def test_an_adapter_on_the_hub_is_no_whole_model(folders, tmp_path):
    with running_hub() as hub:
        hub.publish("owner/lora", {file.name: file.read_bytes() for file in folders.lora.iterdir()})
        environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        run = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert run.returncode == 0, run.stderr[-2000:]
    messages = json.loads(run.stdout.splitlines()[-1])
    assert len(messages) == 5
    assert all("owner/lora is a LoRA adapter" in message for message in messages), messages
