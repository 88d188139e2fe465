"""A stand-in for vLLM's decoder, made of a model of transformers, and images as its requests bring them."""

from types import SimpleNamespace
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_ivtp.vllm_plugin.encoding import ImageEncoder, Item
from modeling_ivtp.vllm_plugin.prefix_decoder import Devices
from tests.support.tiny import rows_alone


class StandinLayer:
    """A layer of transformers with the parts that vLLM's layers have: one projection for queries, keys and values.

    With `devices`, it is the part of a layer that the device of number `rank` has: a share of the heads.
    """

    def __init__(self, layer: Any, rotary: Any, devices: Devices | None = None, rank: int = 0) -> None:
        attention = layer.self_attn
        count = 1 if devices is None else devices.count
        width = attention.head_dim
        heads = attention.config.num_attention_heads // count * width
        keys = attention.config.num_key_value_heads // count * width
        sizes = ((attention.q_proj, heads), (attention.k_proj, keys), (attention.v_proj, keys))
        own = [part.weight[rank * size : (rank + 1) * size] for part, size in sizes]
        outward = attention.o_proj.weight[:, rank * heads : (rank + 1) * heads]
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        mlp = layer.mlp
        self.mlp = SimpleNamespace(
            gate_up_proj=lambda hidden: (torch.cat([mlp.gate_proj(hidden), mlp.up_proj(hidden)], -1), None),
            act_fn=lambda inner: mlp.act_fn(inner.chunk(2, -1)[0]) * inner.chunk(2, -1)[1],
            down_proj=lambda inner: (mlp.down_proj(inner), None),
        )

        def turned(positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
            cos, sin = rotary(query[None], position_ids=positions[None])
            split = [part.view(1, len(positions), -1, width).transpose(1, 2) for part in (query, key)]
            return [part.transpose(1, 2).flatten(2)[0] for part in apply_rotary_pos_emb(*split, cos, sin)]

        def together(hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
            output = hidden @ outward.T
            return (output if devices is None else devices.sum(output)), None

        self.self_attn = SimpleNamespace(
            q_size=heads,
            kv_size=keys,
            head_dim=width,
            scaling=attention.scaling,
            qkv_proj=lambda hidden: (torch.cat([hidden @ weight.T for weight in own], -1), None),
            o_proj=together,
            rotary_emb=turned,
        )


def encoder_of(model: Any, devices: Devices | None = None, rank: int = 0, scored: bool = True) -> ImageEncoder:
    """Make an encoder of a model; with `scored=False` its scores do not know of the other devices."""
    language = model.model.language_model
    decoder: Any = SimpleNamespace(
        embed_tokens=language.embed_tokens,
        layers=[StandinLayer(layer, language.rotary_emb, devices, rank) for layer in language.layers],
    )
    encoder = ImageEncoder(model.config, decoder, devices if scored else None).eval()
    missing, unexpected = encoder.load_state_dict(
        {name: value for name, value in model.model.state_dict().items() if not name.startswith("language_model")},
        strict=False,
    )
    assert not missing
    assert not unexpected
    return encoder


def items_of(inputs: Any, rows: list[list[Any]], budget: int = 4) -> list[Item]:
    """Return the images of a batch's rows."""
    items = []
    for at, row in enumerate(rows_alone(inputs, rows)):
        for number in range(rows[at].count("image")):
            keys = tuple((at, image) for image in range(len(row["pixel_values"])))
            words = {name: row[name][0] for name in ("clip_input_ids", "clip_spans")}
            items.append(Item(row["pixel_values"], keys, number, budget, row["input_ids"][0], **words))
    return items
