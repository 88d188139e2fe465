"""vLLM's first decoder layers as the pass ahead of the decoder needs them: on whole prompts, without its KV cache.

The layers are vLLM's own, so weights are held once, quantised as the server wants them. Attention is computed here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import repeat_kv

from ..model.language_ivtp import GroupedDecoder
from ..model.pseudo_cls_attention import PseudoCLSAttention


def without_adapters(module: nn.Module) -> Any:
    """Return the layer that adapters (LoRA) were laid over, or the layer itself.

    What an image keeps is cached for all requests about it, whatever adapter they name, so the base model chooses.
    """
    return getattr(module, "base_layer", module)


@dataclass(frozen=True)
class Devices:
    """The devices that share every layer's heads (tensor parallelism).

    A layer's projections put their own outputs together. What a group of layers is scored by needs, for each layer, one
    sum of rows that every device has averaged over its heads, and for each group one of its squared value norms.

    Attributes
    ----------
    count : int
    sum : callable
        Adds up a tensor over all of them, and gives each the same result.
    """

    count: int
    sum: Callable[[torch.Tensor], torch.Tensor]


class PrefixLayer:
    """A decoder layer of vLLM, called as `GroupedDecoder` calls its layers.

    Parameters
    ----------
    layer : Module
        Of LLaMA's architecture as vLLM builds it: `input_layernorm`, `self_attn` with a joint `qkv_proj`,
        `post_attention_layernorm`, and `mlp` with a joint `gate_up_proj`.
    devices : Devices, optional
        Those that share the layer's heads. Default: this device has all.
    """

    def __init__(self, layer: nn.Module, devices: "Devices | None" = None) -> None:
        self.layer: Any = layer
        self.devices = devices

    def __call__(
        self,
        hidden: torch.Tensor,
        position_embeddings: torch.Tensor,
        record: PseudoCLSAttention | None = None,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Run the layer on tokens (B, n + M, d), of which the last M are pseudo-CLS tokens if there is a `record`.

        `position_embeddings` are their positions, int64 (B, n + M): vLLM's layers turn queries and keys themselves.
        """
        attention = self.layer.self_attn
        flat = hidden.flatten(0, 1)
        joint, _ = without_adapters(attention.qkv_proj)(self.layer.input_layernorm(flat))
        query, key, value = joint.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        query, key = attention.rotary_emb(position_embeddings.flatten(), query.contiguous(), key.contiguous())
        if self.devices is not None and record is not None and record.record is not None:
            record.record.sum_over_devices, record.record.devices = self.devices.sum, self.devices.count
        shape = (*hidden.shape[:2], -1, attention.head_dim)
        query, key, value = (part.reshape(shape).transpose(1, 2) for part in (query, key, value))
        output = self._attend(query, key, value, record, attention_mask, attention.scaling)
        output, _ = without_adapters(attention.o_proj)(output.flatten(2).flatten(0, 1))
        flat = flat + output
        mlp = self.layer.mlp
        inner, _ = without_adapters(mlp.gate_up_proj)(self.layer.post_attention_layernorm(flat))
        output, _ = without_adapters(mlp.down_proj)(mlp.act_fn(inner))
        return (flat + output).view_as(hidden)

    @staticmethod
    def _attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        record: PseudoCLSAttention | None,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Return the attention's output (B, n + M, H, dh) from queries, keys and values (B, H, n + M, dh)."""
        tokens = query.shape[2] - (0 if record is None else record.count)
        pseudo_cls = (query[:, :, tokens:], key[:, :, tokens:], value[:, :, tokens:])
        query, key, value = query[:, :, :tokens], key[:, :, :tokens], value[:, :, :tokens]
        repeats = query.shape[1] // key.shape[1]
        output = nn.functional.scaled_dot_product_attention(
            query,
            repeat_kv(key, repeats),
            repeat_kv(value, repeats),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        ).transpose(1, 2)
        if record is None:
            return output
        return torch.cat([output, record.attend(query, key, value, pseudo_cls, value, scale)], 1)


class PrefixDecoder(GroupedDecoder):
    """The first layers of a decoder of vLLM, in groups that drop tokens: `choose` is `GroupedDecoder`'s.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the decoder.
    layers : sequence of Module
    devices : Devices, optional
        Those that share their heads.
    """

    def __init__(self, config: Any, layers: Sequence[nn.Module], devices: Devices | None = None) -> None:
        self.config = config
        self.layers = [PrefixLayer(layer, devices) for layer in layers]

    def rotary_emb(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Return the positions themselves (B, n), for `PrefixLayer`."""
        return position_ids
