"""Identity of a checkpoint and of the code that answers, and the check that a checkpoint belongs to this world."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

from benchmarks.quality.world import SIDES, answer_words, fingerprint

ANSWER_TOKENS = 4


def checkpoint_fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits that identify a checkpoint: a hash of weights, configuration and vocabulary.

    Raises
    ------
    ValueError
        If the folder holds no checkpoint.
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


def code_files() -> list[Path]:
    """List the files whose code decides the answers: the package's model and methods, and the benchmark's rows."""
    here = Path(__file__).parent
    package = here.parents[1] / "modeling_ivtp"
    files = [file for folder in ("model", "methods") for file in sorted((package / folder).rglob("*.py"))]
    return [here / "methods.py", here / "examination.py", *files]


def code_fingerprint() -> str:
    """Return 16 hexadecimal digits that identify the code that answers: answers of other code are not continued."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in code_files())).hexdigest()[:16]


def check_world(model: Any, processor: Any) -> None:
    """Check that a checkpoint belongs to this world and reads what the processor writes.

    Raises
    ------
    ValueError
        If the checkpoint was trained on another world, or its words or images do not fit.
    """
    config, tokenizer = model.config, processor.tokenizer
    world = getattr(config, "world_fingerprint", None)
    if world is None:
        warnings.warn(
            "The checkpoint's config has no world_fingerprint, so it is unknown whether it was trained on this world.",
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
