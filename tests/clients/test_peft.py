"""PEFT and Trainer, as their users call them: LoRA on all linear layers from training to a merged answer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from tests.clients.conftest import EXAMPLES, KeptPatches

peft = pytest.importorskip("peft", reason="PEFT is not installed; make test-clients does it")

pytestmark = pytest.mark.slow


def collate(processor: Any) -> Any:
    """A collator as tutorials write it: the template's text, the processor, and labels without padding."""

    def batch(examples: list[Any]) -> Any:
        texts = [
            processor.apply_chat_template(
                [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]},
                    {"role": "assistant", "content": [{"type": "text", "text": example.answer}]},
                ]
            )
            for example in examples
        ]
        images = [example.image for example in examples]
        inputs = processor(images=images, text=texts, padding=True, add_special_tokens=False, return_tensors="pt")
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return inputs

    return batch


def prompt(processor: Any) -> Any:
    content = [{"type": "image", "image": EXAMPLES[0].image}, {"type": "text", "text": EXAMPLES[0].question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def trainer(model: Any, processor: Any, path: Path, **options: Any) -> Any:
    arguments = TrainingArguments(
        str(path),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=EXAMPLES, data_collator=collate(processor))


def test_lora_on_all_linear_layers_trains_saves_loads_merges_and_answers(
    folder: Path, tmp_path: Path, kept_patches: KeptPatches
) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    options = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(folder), options)
    trainer(model, processor, tmp_path / "run", save_strategy="no").train()
    learned = {name: bool(parameter.any()) for name, parameter in model.named_parameters() if "lora_B" in name}
    # PEFT wraps what chooses patches, too; training leaves that as it was, as zeros.
    choosing = {name for name in learned if "clip_text_model" in name or "visual_projection" in name}
    assert choosing
    assert not any(learned[name] or model.get_parameter(name).requires_grad for name in choosing)
    assert all(learned[name] for name in learned if "language_model" in name or "multi_modal_projector" in name)
    model.save_pretrained(tmp_path / "adapter")

    model.eval()
    inputs = prompt(processor)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(folder), tmp_path / "adapter"
    ).eval()
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(
        again.generate(**inputs, max_new_tokens=4, do_sample=False),
        merged.generate(**inputs, max_new_tokens=4, do_sample=False),
    )


def test_trainer_saves_a_checkpoint_and_goes_on_from_it(
    folder: Path, tmp_path: Path, kept_patches: KeptPatches
) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    first = trainer(model, processor, tmp_path, save_steps=1, save_total_limit=2)
    first.train()
    assert [entry["loss"] > 0 for entry in first.state.log_history if "loss" in entry] == [True, True]
    fresh = AutoModelForImageTextToText.from_pretrained(folder)
    second = trainer(fresh, processor, tmp_path, save_strategy="no")
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], parameter, msg=lambda text, name=name: f"{name}: {text}")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-2").model.guide is not None
