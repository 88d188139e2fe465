"""Which checkpoint an evaluation is of, and whether it belongs to this world."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

from benchmarks.quality.world import SIDES, answer_words, fingerprint

ANSWER_TOKENS = 4


def checkpoint_fingerprint(folder: Path) -> str:
    """What identifies a checkpoint: its weights, configuration and words, in 16 hexadecimal digits.

    Raises
    ------
    ValueError
        If there is no checkpoint.
    """
    files = sorted(file for kind in ("*.json", "*.safetensors") for file in Path(folder).glob(kind))
    if not any(file.name == "config.json" for file in files):
        raise ValueError(f"{folder} is no checkpoint: it has no config.json.")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:16]


def code_fingerprint() -> str:
    """What identifies the code that answers: no evaluation goes on with answers that other code gave."""
    here = Path(__file__).parent
    files = [here / "methods.py", here / "examination.py", *sorted((here.parents[1] / "modeling_ivtp").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def check_world(model: Any, processor: Any) -> None:
    """See that a checkpoint belongs to this world and reads what the processor writes.

    Raises
    ------
    ValueError
        For a checkpoint of another world, or one whose words or images are others.
    """
    config, tokenizer = model.config, processor.tokenizer
    world = getattr(config, "world_fingerprint", None)
    if world is None:
        warnings.warn(
            "The checkpoint's config has no world_fingerprint: whether it was trained on this world cannot be told.",
            stacklevel=2,
        )
    elif world != fingerprint():
        raise ValueError(
            f"The checkpoint was trained on another world (world_fingerprint {world}; this one is {fingerprint()}): "
            "its kinds, colours or drawings differ, and its accuracy here would mean nothing."
        )
    if config.vision_config.image_size not in SIDES:
        raise ValueError(
            f"vision_config.image_size={config.vision_config.image_size}; scenes can have {SIDES[0]} to {SIDES[-1]} "
            "pixels in steps of 14."
        )
    if config.vision_config.patch_size != 14:
        raise ValueError(f"vision_config.patch_size={config.vision_config.patch_size}; this world's patches have 14.")
    words = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > words:
        raise ValueError(f"The processor writes {len(tokenizer)} different tokens, the language model reads {words}.")
    marker = tokenizer.convert_tokens_to_ids(processor.image_token)
    if marker != config.image_token_id:
        raise ValueError(f"The processor's image token is number {marker}, the model's is {config.image_token_id}.")
    clip = getattr(processor, "clip_tokenizer", None)
    if config.clip_text_config is not None and clip is not None and len(clip) > config.clip_text_config.vocab_size:
        raise ValueError(
            f"The processor writes {len(clip)} different tokens for CLIP, its text tower reads "
            f"{config.clip_text_config.vocab_size}."
        )
    for word in answer_words():
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id in ids or len(ids) > ANSWER_TOKENS:
            raise ValueError(
                f"The tokenizer cannot say {word!r} in {ANSWER_TOKENS} tokens: it takes {len(ids)}"
                f"{' and an unknown one' if tokenizer.unk_token_id in ids else ''}."
            )
