"""Placeholders of an image in a prompt: the processor writes them, the model puts a feature into each.

The processor counts them by `patch_size`, `vision_feature_select_strategy` and `num_additional_image_tokens`; for a
model with a connector by `connector_tokens` alone. Folders that an older transformers saved lack some of these, and the
count is then wrong or fails; the model's configuration has what is missing.
"""

from typing import Any

from PIL import Image

COUNTED_BY = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "connector_tokens")
"""The processor's attributes that the count depends on."""


def features_of_image(config: Any) -> int:
    """Return how many features the language model gets of an image.

    They are its patches, and the CLS token with strategy "full"; or a connector's tokens.
    """
    if getattr(config, "connector", None) is not None:
        return int(config.connector.tokens)
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return int(patches + (config.vision_feature_select_strategy == "full"))


def complete_processor(processor: Any, config: Any) -> None:
    """Take the numbers that placeholders are counted by from the model's configuration, if the count is wrong."""
    if _placeholders(processor, config)[0] != features_of_image(config):
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # CLIP's CLS token
        connector = getattr(config, "connector", None)
        processor.connector_tokens = None if connector is None else connector.tokens


def check_placeholders(processor: Any, config: Any, source: object) -> None:
    """Raise ValueError unless the processor writes one placeholder for each feature that the model reads.

    Parameters
    ----------
    processor : LlavaProcessor
    config : LlavaConfig
    source : str or path
        The name or path that the user gave; the error names it.
    """
    count, height, width = _placeholders(processor, config)
    features, vision = features_of_image(config), config.vision_config
    if (count, height, width) != (features, vision.image_size, vision.image_size):
        raise ValueError(
            f"the processor of {source} writes {count} placeholders of token {config.image_token_index} for an image, "
            f"the model reads {features} features of it: images of {height} x {width} pixels for a vision tower of "
            f"{vision.image_size} x {vision.image_size} and patches of {vision.patch_size}; image token "
            f"{processor.image_token!r}; "
            + ", ".join(f"{name}={getattr(processor, name, None)!r}" for name in COUNTED_BY)
        )


def _placeholders(processor: Any, config: Any) -> tuple[int, int, int]:
    """Return the placeholders of one image in a prompt, and the height and width of its pixels; (0, 0, 0) unknown."""
    if processor.patch_size is None:
        return 0, 0, 0
    size = config.vision_config.image_size
    inputs = processor(images=Image.new("RGB", (size, size)), text=processor.image_token)
    height, width = inputs["pixel_values"][0].shape[-2:]
    return sum(token == config.image_token_index for token in inputs["input_ids"][0]), height, width
