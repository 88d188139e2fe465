"""Counts of what pruning spares on a vLLM server, in the registry that its `/metrics` shows.

Counts follow from a request's budget, so they are known where the request is read: in the server's own process.
"""

from functools import cached_property
from typing import Any

from prometheus_client import REGISTRY, Histogram

from ..model.pruned_cache import key_value_shape

KEPT, DROPPED, SPARED = "ivtp:kept_visual_tokens", "ivtp:dropped_visual_tokens", "ivtp:spared_kv_cache_bytes"
"""Names of the histograms; each counts the requests with pictures, and sums over them."""

_TOKENS = (0, 16, 32, 64, 96, 128, 192, 256, 384, 576, 1152, 2304, 4608)
_BYTES = tuple(2**power for power in range(16, 34, 2))
_HELP = {
    KEPT: ("Visual tokens that stay of a request's pictures.", _TOKENS),
    DROPPED: ("Visual tokens that are dropped of a request's pictures.", _TOKENS),
    SPARED: ("KV cache that the dropped tokens would have taken, in the model's dtype over all layers.", _BYTES),
}


class PruningMetrics:
    """Histograms of what stays of requests with pictures.

    Parameters
    ----------
    config : IVTPLlavaConfig
    bytes_per_value : int
        Of the KV cache.
    """

    def __init__(self, config: Any, bytes_per_value: int) -> None:
        heads, width = key_value_shape(config.text_config)
        self.patches = config.num_patches
        self.token_bytes = 2 * heads * width * config.text_config.num_hidden_layers * bytes_per_value

    @cached_property
    def histograms(self) -> dict[str, Histogram]:
        """The process's histograms, made at the first request: a registry takes a name once."""
        known: Any = REGISTRY._names_to_collectors
        return {
            name: known.get(name) or Histogram(name, text, buckets=buckets) for name, (text, buckets) in _HELP.items()
        }

    def count(self, images: int, visual_tokens: int) -> None:
        """Count a request of some images, each of which keeps `visual_tokens`."""
        dropped = images * (self.patches - visual_tokens)
        for name, value in ((KEPT, images * visual_tokens), (DROPPED, dropped), (SPARED, dropped * self.token_bytes)):
            self.histograms[name].observe(value)
