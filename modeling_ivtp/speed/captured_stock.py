"""A harder baseline on a GPU: stock LLaVA that replays images and prompts as CUDA graphs, as ours can."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from ..model.compat import CACHE, cache_of, one_cache
from ..model.cuda_graphs import Graphs


class CapturedLlava(LlavaForConditionalGeneration):
    """Stock LLaVA with replay, for greedy answers to prompts without padding and with one image a row."""

    graphs: Graphs

    def forward(self, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        """Return the logits of a prompt's last token; run stock's forward on anything else."""
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if pixel_values is None and encoded is None:
            return super().forward(input_ids=input_ids, **kwargs)
        if encoded is None:
            encoded = self.model.get_image_features(pixel_values)
        features = encoded.pooler_output
        features = features if isinstance(features, torch.Tensor) else torch.stack(list(features))
        outputs = _run(self, "prompt", self._prompt, {"input_ids": input_ids, "features": features})
        cache = one_cache(kwargs.get("cache"), kwargs.get("past_key_values"))
        cache = DynamicCache(config=self.config.text_config) if cache is None else cache
        for layer, (keys, values) in zip(cache.layers, outputs["layers"], strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return LlavaCausalLMOutputWithPast(logits=self.lm_head(outputs["last"]), **{CACHE: cache})

    def _prompt(self, input_ids: torch.Tensor, features: torch.Tensor) -> dict[str, Any]:
        embeds = self.model.get_input_embeddings()(input_ids)
        placeholders = (input_ids == self.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(placeholders, features.to(embeds.dtype))
        cache = DynamicCache(config=self.config.text_config)
        output = self.model.language_model(inputs_embeds=embeds, use_cache=True, **{CACHE: cache})
        layers = [(layer.keys, layer.values) for layer in cache_of(output).layers]
        return {"last": output.last_hidden_state[:, -1:], "layers": layers}


def captured(stock: Any, graphs: Graphs) -> Any:
    """Make a stock twin replay its images and prompts, and return it."""
    stock.__class__, stock.graphs = CapturedLlava, graphs
    encode = stock.model.get_image_features

    def features_of(pixel_values: torch.Tensor) -> Any:
        return encode(pixel_values).pooler_output

    def replayed(pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        features = _run(stock, "images", features_of, {"pixel_values": pixel_values})
        return BaseModelOutputWithPooling(pooler_output=features)

    stock.model.get_image_features = replayed
    return stock


def _run(stock: Any, what: str, function: Any, inputs: dict[str, torch.Tensor]) -> Any:
    outputs = stock.graphs.run(stock, what, function, inputs)
    return function(**inputs) if outputs is None else outputs
