"""What a pruned prompt holds in memory: no attention map outlives its use, and the peak lies below the unpruned."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_ivtp import IVTPLlavaConfig, IVTPLlavaForConditionalGeneration
from tests.support.tiny import randomize


class LiveTensors(TorchDispatchMode):
    """Follows every tensor that an operation returns for as long as its storage lives."""

    def __init__(self, model):
        super().__init__()
        self.weights = {parameter.untyped_storage() for parameter in model.parameters()}
        self.live = weakref.WeakKeyDictionary()
        self.shapes = weakref.WeakKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage in self.weights:
                    continue
                self.live[storage] = storage.nbytes()
                self.shapes.setdefault(storage, tuple(tensor.shape))
        self.peak = max(self.peak, sum(self.live.values()))
        return result

    def maps(self, least):
        """Shapes of live square maps of at least `least` tokens; weights have two dimensions, maps more."""
        return [shape for shape in self.shapes.values() if len(shape) > 2 and shape[-1] == shape[-2] >= least]


@pytest.fixture(scope="module")
def vit_l():
    """LLaVA-1.5's vision tower in full, ViT-L/14 at 336 pixels, before a decoder of half LLaVA-1.5's width.

    All layers of a tower share their weights, which do not count here, and would take two gigabytes.
    """
    config = IVTPLlavaConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 5504,
            "num_hidden_layers": 6,
            "num_attention_heads": 16,
            "vocab_size": 200,
            "pad_token_id": 0,
        },
        image_token_index=199,
        pruning={"decoder_layers": 6, "guidance": "visual_cls"},
    )
    with torch.device("meta"):
        model = IVTPLlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model = model.to_empty(device="cpu")
    for layers in (model.model.vision_tower.encoder.layers, model.model.language_model.layers):
        for layer in layers[1:]:
            layer.load_state_dict(layers[0].state_dict(), assign=True)
    for module in model.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(577)[None]
        if hasattr(module, "inv_freq"):
            module.inv_freq = 1 / 10000 ** (torch.arange(0, 128, 2) / 128)
    ids = torch.tensor([[5] * 20 + [199] * 576 + [7] * 40])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}
    return randomize(model).eval(), inputs


@pytest.mark.slow
@torch.no_grad()
def test_the_peak_of_a_pruned_prompt_lies_below_the_unpruned_one(vit_l):
    model, inputs = vit_l
    peaks = {}
    for enabled in (True, False):
        with model.pruning(enabled=enabled), LiveTensors(model) as tensors:
            model(**inputs, use_cache=True, logits_to_keep=1)
        peaks[enabled] = tensors.peak
    print(f"peak besides the weights: {peaks[True] / 2**20:.1f} MiB pruned, {peaks[False] / 2**20:.1f} MiB unpruned")
    assert peaks[True] < peaks[False]


@pytest.mark.slow
@torch.no_grad()
def test_no_attention_map_outlives_its_use(vit_l):
    """A head's map goes with its layer; the average over heads, if a CPU makes one, when its group was scored."""
    model, inputs = vit_l
    alive, seen = [], []
    layers = [*model.model.vision_tower.encoder.layers, *model.model.language_model.layers]
    with LiveTensors(model) as tensors:
        hooks = [layer.register_forward_hook(lambda *_: alive.append(tensors.maps(60))) for layer in layers]
        original = torch.Tensor.softmax
        try:
            torch.Tensor.softmax = lambda self, *a, **k: (seen.append(tuple(self.shape)), original(self, *a, **k))[1]
            model(**inputs, use_cache=True, logits_to_keep=1)
        finally:
            torch.Tensor.softmax = original
            for hook in hooks:
                hook.remove()
    assert any(shape[-1] == shape[-2] == 577 for shape in seen)  # maps do exist, for as long as a head needs one
    assert all(len(shape) == 3 for shapes in alive for shape in shapes)
    groups = [alive[first : first + 3] for first in range(0, 24, 3)]
    # Two layers of a group leave their averages, and the first of the next group begins without them.
    assert all([len(shapes) for shapes in group] == [1, 2, 2] for group in groups)
    assert all(not shapes for shapes in alive[24:])
    # The last layer of a group needs the reference token's row alone.
    rows = [shape for shape in seen if shape[-2] == 1]
    assert len(rows) == 8 + 2
