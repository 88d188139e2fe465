"""CLIP's text half gives the same features as the library it was published with."""

import json

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection

from modeling_ivtp.checkpoints.clip_checkpoint import load_clip_text
from modeling_ivtp.checkpoints.weights import Checkpoint, TensorInfo, write_safetensors

VOCABULARY = 49408
TEXT = {"context_length": 16, "vocab_size": VOCABULARY, "width": 128, "heads": 2, "layers": 2}
VISION = {"image_size": 28, "patch_size": 14, "width": 128, "layers": 2}


def open_clip_model(kind=CLIP, quick_gelu=True, **text):
    torch.manual_seed(0)
    return kind(embed_dim=48, vision_cfg=VISION, text_cfg=TEXT | text, quick_gelu=quick_gelu).eval()


def save(model, path):
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def transformers_text(clip):
    """The converted text tower and the projection of the image, as modules."""
    model = CLIPTextModelWithProjection(clip.text_config).eval()
    tensors = dict(clip.tensors())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == clip.shapes
    projection = tensors.pop("visual_projection.weight")
    model.load_state_dict({name.removeprefix("clip_text_model."): tensor for name, tensor in tensors.items()})
    return model, projection


@torch.no_grad()
def token_features(model, ids):
    return model.text_projection(model.text_model(ids).last_hidden_state)


@torch.no_grad()
def open_clip_features(model, ids):
    text = model.text if hasattr(model, "text") else model
    hidden = text.transformer(text.token_embedding(ids) + text.positional_embedding, attn_mask=model_mask(model))
    return text.ln_final(hidden) @ text.text_projection


def model_mask(model):
    return model.text.attn_mask if hasattr(model, "text") else model.attn_mask


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP], ids=["flat names", "text. names"])
def test_an_open_clip_file_gives_open_clips_features(tmp_path, kind, activation):
    theirs = open_clip_model(kind, quick_gelu=activation == "quick_gelu")
    clip = load_clip_text(save(theirs, tmp_path / "clip.safetensors"), activation=activation)
    ours, projection = transformers_text(clip)
    ids = clip.tokenizer(
        ["how many dogs?", "a red car"], padding="max_length", max_length=16, return_tensors="pt"
    ).input_ids

    torch.testing.assert_close(token_features(ours, ids), open_clip_features(theirs, ids), atol=1e-5, rtol=1e-5)
    pooled = ours(ids).text_embeds
    torch.testing.assert_close(pooled, theirs.encode_text(ids), atol=1e-5, rtol=1e-5)
    # open_clip projects the CLS token after ln_post, LLaVA's tower calls that norm post_layernorm.
    with torch.no_grad():
        image = torch.randn(2, 3, 28, 28)
        expected = theirs.encode_image(image)
        weight, theirs.visual.proj = theirs.visual.proj, None
        torch.testing.assert_close(theirs.encode_image(image) @ projection.T, expected, atol=1e-5, rtol=1e-5)
    assert (clip.vision_width, clip.text_config.projection_dim) == tuple(weight.shape)
    assert torch.equal(clip.class_embedding(), theirs.visual.class_embedding)


def test_the_other_activation_differs(tmp_path):
    theirs = open_clip_model(quick_gelu=True)
    path = save(theirs, tmp_path / "clip.safetensors")
    ids = torch.randint(0, VOCABULARY, (1, 16))
    wrong, _ = transformers_text(load_clip_text(path, activation="gelu"))
    assert not torch.allclose(token_features(wrong, ids), open_clip_features(theirs, ids), atol=1e-4)
    assert load_clip_text(path).text_config.hidden_act == "quick_gelu"


def transformers_clip(folder, **save_options):
    torch.manual_seed(0)
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=text, vision_config=vision | {"image_size": 28}, projection_dim=24)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder, **save_options)
    return model


@pytest.mark.parametrize("shards", ["1GB", "100KB"], ids=["one file", "shards"])
def test_a_transformers_folder_gives_its_own_features(tmp_path, shards):
    theirs = transformers_clip(tmp_path, max_shard_size=shards)
    clip = load_clip_text(tmp_path)
    ours, projection = transformers_text(clip)
    ids = clip.tokenizer(["what colour is the bus?"], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs.text_projection(theirs.text_model(ids).last_hidden_state)
    torch.testing.assert_close(token_features(ours, ids), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(projection, theirs.visual_projection.weight)
    assert clip.vision_width == 32
    assert torch.equal(clip.class_embedding(), theirs.vision_model.embeddings.class_embedding)


def test_the_vision_tower_is_never_read(tmp_path, monkeypatch):
    transformers_clip(tmp_path)
    read, original = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.append(name) or original(self, name))
    dict(load_clip_text(tmp_path).tensors())
    assert read
    assert not [name for name in read if name.startswith("vision_model")]


def test_a_folder_with_its_own_tokenizer_keeps_it(tmp_path):
    transformers_clip(tmp_path)
    load_clip_text(tmp_path).tokenizer.save_pretrained(tmp_path)
    assert load_clip_text(tmp_path).tokenizer("two cats").input_ids[0] == 49406


@pytest.fixture
def registered_model(tmp_path):
    (tmp_path / "tiny-clip.json").write_text(json.dumps({"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    return "tiny-clip"


def test_an_open_clip_model_with_a_local_file(tmp_path, registered_model):
    theirs = open_clip_model(quick_gelu=False)
    path = save(theirs, tmp_path / "weights.safetensors")
    clip = load_clip_text(f"open_clip:{registered_model}/{path}")
    ids = torch.randint(0, VOCABULARY, (2, 16))
    ours, _ = transformers_text(clip)
    torch.testing.assert_close(token_features(ours, ids), open_clip_features(theirs, ids), atol=1e-5, rtol=1e-5)
    assert clip.text_config.hidden_act == "gelu"
    fallback = load_clip_text(f"open_clip:{registered_model}/{path}", activation="quick_gelu")
    assert fallback.text_config.hidden_act == "quick_gelu"


def test_an_open_clip_folder(tmp_path):
    save(open_clip_model(), tmp_path / "open_clip_model.safetensors")
    config = {"embed_dim": 48, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    for source in (tmp_path, f"open_clip:local-dir:{tmp_path}"):
        assert load_clip_text(source).text_config.hidden_act == "quick_gelu"


def test_a_published_tag_is_downloaded_as_safetensors_and_knows_its_activation(tmp_path, monkeypatch, registered_model):
    from modeling_ivtp.checkpoints import sources

    save(open_clip_model(), tmp_path / "open_clip_model.safetensors")
    tags = {registered_model: {"openai": {"hf_hub": "somebody/tiny/", "quick_gelu": True}}}
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", tags)
    asked = []

    def snapshot(repo, **options):
        asked.append((repo, options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(sources.HubOptions, "check", lambda *_: None)
    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    clip = load_clip_text(f"open_clip:{registered_model}/openai", activation="gelu")
    assert asked == [("somebody/tiny", ["open_clip_model.safetensors"])]
    assert clip.text_config.hidden_act == "quick_gelu"


def test_a_repository_without_safetensors_is_read_from_the_hubs_own_conversion(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from modeling_ivtp.checkpoints import sources

    weights, small = tmp_path / "weights", tmp_path / "small"
    transformers_clip(weights)
    small.mkdir()
    (weights / "config.json").rename(small / "config.json")
    folders = {None: small, "refs/pr/8": weights}
    monkeypatch.setattr(sources.HubOptions, "check", lambda *_: None)
    monkeypatch.setattr(sources, "snapshot_download", lambda repo, revision, **_: str(folders[revision]))
    request = SimpleNamespace(git_reference="refs/pr/8")
    monkeypatch.setattr(sources, "get_repo_discussions", lambda repo, **_: iter([request]))
    assert load_clip_text("somebody/clip").vision_width == 32

    monkeypatch.setattr(sources, "get_repo_discussions", lambda repo, **_: iter([]))
    monkeypatch.setattr(sources.HfApi, "list_repo_files", lambda *_, **__: ["pytorch_model.bin"])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*open_clip:ViT-L-14-336/openai"):
        load_clip_text("somebody/clip")


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("token_embedding.weight"), r"lacks token_embedding\.weight"),
        (lambda t: t.pop("text_projection"), "lacks text_projection"),
        (lambda t: t.pop("visual.proj"), r"lacks visual\.proj"),
        (lambda t: t.pop("transformer.resblocks.1.attn.in_proj_bias"), r"lacks .*resblocks\.1\.attn\.in_proj_bias"),
        (lambda t: t.update({"visual.proj": torch.zeros(128, 40)}), r"visual\.proj .* \(128, 40\)"),
    ],
)
def test_an_open_clip_file_that_is_not_whole_is_refused(tmp_path, change, message):
    path = save(open_clip_model(), tmp_path / "clip.safetensors")
    edit(path, change)
    with pytest.raises(ValueError, match=message):
        load_clip_text(path)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("open_clip:ViT-Q-7/openai", ValueError, "no model 'ViT-Q-7'"),
        ("open_clip:ViT-L-14-336/nobody", ValueError, "'nobody' is neither.*openai"),
        ("open_clip:ViT-L-14-336", ValueError, "openai"),
        ("./no/such/folder", FileNotFoundError, "neither a folder here nor"),
        ("missing.safetensors", FileNotFoundError, "does not exist"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        load_clip_text(source)


@pytest.mark.parametrize("name", ["clip.pt", "clip.bin"])
def test_a_file_that_can_run_code_is_refused(tmp_path, name):
    torch.save({}, tmp_path / name)
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        load_clip_text(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"hf_model_name": "roberta"}, "hf_model_name='roberta'"),
        ({"embed_cls": True}, "embed_cls"),
        ({"no_causal_mask": True}, "no_causal"),
    ],
)
def test_a_text_tower_unlike_clips_is_refused(tmp_path, text, message):
    save(open_clip_model(), tmp_path / "open_clip_model.safetensors")
    config = {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT | text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(ValueError, match=message):
        load_clip_text(tmp_path)


def test_other_models_and_formats_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin"):
        load_clip_text(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model_type 'siglip'"):
        load_clip_text(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = save(open_clip_model(), tmp_path / "clip.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(OSError, match=r"clip\.safetensors is truncated"):
        load_clip_text(path)


def test_shards_that_are_not_whole_are_named(tmp_path):
    transformers_clip(tmp_path, max_shard_size="100KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(OSError, match=f"{shard.name} is truncated"):
        load_clip_text(tmp_path)
    save_file({"other": torch.zeros(1)}, shard)
    with pytest.raises(OSError, match=f"{shard.name} lacks"):
        load_clip_text(tmp_path)
    shard.unlink()
    with pytest.raises(OSError, match=f"{shard.name} is missing"):
        load_clip_text(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    with pytest.raises(OSError, match="a shard is a file in the same folder"):
        load_clip_text(tmp_path)


def test_what_is_written_tensor_by_tensor_reads_back(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randn(4, 2).T,
        "c": torch.tensor(7),
        "d": torch.tensor([True, False, True]),
        "e": torch.zeros(0, 3),
    }
    infos = {name: TensorInfo("", tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    wrote = []
    write_safetensors(tmp_path / "x.safetensors", infos, tensors.__getitem__, wrote.append)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert sum(wrote) == sum(info.nbytes for info in infos.values())
