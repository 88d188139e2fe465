"""A tiny checkpoint on disk, conversations about pictures, and a look at which patches every forward keeps."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from modeling_ivtp.model.modeling_ivtp import IVTPLlavaModel
from tests.support.text_tokenizers import LLAVA_TEMPLATE
from tests.support.text_tokenizers import processor as make_processor
from tests.support.tiny import model_for

QUESTIONS = ("What is the colour of the bird?", "Is there a dog, or a small cup, on the wooden table?")
ANSWERS = ("It is red and sits on a branch.", "No.")
# Trainers compare prompts with and without answers, so the one begins as the other does, end token included.
TEMPLATE = LLAVA_TEMPLATE.replace(
    "part['text'] + ' ' }}{% endgeneration", "part['text'] + eos_token }}{% endgeneration"
)


def picture(index: int) -> Image.Image:
    return Image.effect_mandelbrot((60, 60), (-2, -1.5, 1, 1.5 - 0.4 * index), 40).convert("RGB")


def user(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def assistant(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]


@dataclass(frozen=True)
class Example:
    """A question about a picture, and its answer."""

    image: Image.Image
    question: str
    answer: str


EXAMPLES = [Example(picture(index), *pair) for index in range(2) for pair in zip(QUESTIONS, ANSWERS, strict=True)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as users have it: weights, processor and both tokenizers."""
    processor = make_processor(size=56, chat_template=TEMPLATE)
    model = model_for(processor, relevance_threshold=0.0)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@dataclass(frozen=True)
class Picture:
    """A row's picture: as pixels, or as the vision tower's output."""

    pixels: torch.Tensor | None
    features: torch.Tensor | None

    def is_of(self, prompt: dict[str, torch.Tensor], model: Any) -> bool:
        """Return whether it is the picture of a prompt."""
        if self.pixels is not None:
            return torch.equal(self.pixels, prompt["pixel_values"][0])
        assert self.features is not None
        features = model.get_image_features(prompt["pixel_values"]).pooler_output[0]
        return torch.allclose(self.features, features, atol=1e-5)


@dataclass
class KeptPatches:
    """Compares what every forward with pictures keeps with what the prompt alone keeps, under the weights in force."""

    processor: Any
    forwards: int = 0
    rows: int = 0
    differences: list[str] = field(default_factory=list)
    _nested: bool = False

    def __post_init__(self) -> None:
        self.prompts = [
            self.processor(images=example.image, text=text, add_special_tokens=special, return_tensors="pt")
            for example in EXAMPLES
            for text in [self._prompt(example.question)]
            for special in (False, True)
        ]

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def check(self, model: Any, inputs: dict[str, Any], outputs: Any) -> None:
        """Compare every row of one forward; `inputs` are the forward's."""
        # `generate` encodes pictures before the forward.
        encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
        if self._nested or (inputs.get("pixel_values") is None and encoded is None):
            return
        self.forwards += 1
        training, self._nested = model.training, True
        model.eval()
        try:
            for row, kept in enumerate(outputs.kept_tokens):
                pixels = None if inputs.get("pixel_values") is None else inputs["pixel_values"][row]
                features = None if encoded is None else encoded.pooler_output[row]
                self._check_row(model, inputs, row, kept, Picture(pixels, features))
        finally:
            model.train(training)
            self._nested = False

    @torch.no_grad()
    def _check_row(self, model: Any, inputs: dict[str, Any], row: int, kept: torch.Tensor, seen: Picture) -> None:
        ids, mask = inputs["input_ids"][row], inputs.get("attention_mask")
        present = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[row].bool()
        ids, kept = ids[present], kept[present]
        for prompt in self.prompts:
            length = prompt["input_ids"].shape[1]
            if torch.equal(ids[:length], prompt["input_ids"][0]) and seen.is_of(prompt, model):
                alone = model(**prompt).kept_tokens[0]
                self.rows += 1
                if not torch.equal(kept[:length], alone):
                    self.differences.append(f"forward {self.forwards}, row {row}: {kept[:length]} but alone {alone}")
                return
        self.differences.append(f"forward {self.forwards}, row {row}: {self.processor.decode(ids)!r} is no prompt")


@pytest.fixture
def kept_patches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeptPatches]:
    """A check of every forward of the test; it fails the test at its end if any patch differs, or none was seen."""
    from transformers import AutoProcessor

    checks = KeptPatches(AutoProcessor.from_pretrained(folder))
    forward = IVTPLlavaModel.forward

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        checks.check(self, kwargs, outputs)
        return outputs

    monkeypatch.setattr(IVTPLlavaModel, "forward", checked)
    yield checks
    assert checks.rows, "no forward had a picture"
    assert not checks.differences, "\n".join(checks.differences)
