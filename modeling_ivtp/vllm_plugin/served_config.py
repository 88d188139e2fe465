"""The configuration as vLLM reads it."""

from typing import Any

from ..model.configuration_ivtp import IVTPLlavaConfig
from ..model.pruned_cache import key_value_shape


class ServedConfig(IVTPLlavaConfig):
    """`IVTPLlavaConfig` whose decoder counts positions in three channels, of which the first alone is used.

    vLLM lets a model move the positions of a running request only if they have several channels.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        text: Any = self.text_config
        _, width = key_value_shape(text)
        text.rope_parameters = {**(text.rope_parameters or {}), "mrope_section": [width // 2, 0, 0]}
