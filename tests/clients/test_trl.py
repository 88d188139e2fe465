"""TRL's trainers, as their users call them: training and log-probabilities keep the patches that generation keeps."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from modeling_ivtp import IVTPLlavaForConditionalGeneration
from tests.clients.conftest import EXAMPLES, KeptPatches, assistant, user

trl = pytest.importorskip("trl", reason="TRL is not installed; make test-clients does it")
datasets = pytest.importorskip("datasets", reason="datasets is not installed; make test-clients does it")

pytestmark = pytest.mark.slow


def dataset(**columns: Any) -> Any:
    """A dataset of all examples: a column with its picture, and what `columns` make of each."""
    rows = {name: [value(example) for example in EXAMPLES] for name, value in columns.items()}
    return datasets.Dataset.from_dict({"image": [example.image for example in EXAMPLES], **rows}).cast_column(
        "image", datasets.Image()
    )


def arguments(path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(path),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


PROMPT = {"prompt": lambda example: user(example.question)}
FORMS = {
    "messages": {"messages": lambda example: user(example.question) + assistant(example.answer)},
    "prompt and completion": PROMPT | {"completion": lambda example: assistant(example.answer)},
}


@pytest.mark.parametrize("form", FORMS)
def test_sft(form: str, folder: Path, tmp_path: Path, kept_patches: KeptPatches) -> None:
    trainer = trl.SFTTrainer(
        model=str(folder),
        args=trl.SFTConfig(**arguments(tmp_path), max_length=None),
        train_dataset=dataset(**FORMS[form]),
    )
    trainer.train()
    assert all(loss > 0 for loss in losses(trainer))
    assert kept_patches.rows == 4


def test_sft_on_the_assistants_words_alone(folder: Path, tmp_path: Path, kept_patches: KeptPatches) -> None:
    trainer = trl.SFTTrainer(
        model=str(folder),
        args=trl.SFTConfig(**arguments(tmp_path), max_length=None, assistant_only_loss=True),
        train_dataset=dataset(**FORMS["messages"]),
    )
    trainer.train()
    assert kept_patches.rows == 4


def test_dpo(folder: Path, tmp_path: Path, kept_patches: KeptPatches) -> None:
    answers = {
        "chosen": lambda example: assistant(example.answer),
        "rejected": lambda example: assistant("I do not see " + example.question),
    }
    trainer = trl.DPOTrainer(
        model=str(folder),
        args=trl.DPOConfig(**arguments(tmp_path), max_length=None),
        train_dataset=dataset(**PROMPT, **answers),
    )
    trainer.train()
    assert len(losses(trainer)) == 2
    assert kept_patches.rows == 2 * 2 * 4  # of the policy and of the reference, chosen and rejected


def longest(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


@pytest.mark.parametrize("trainer", ["GRPO", "RLOO"])
def test_policies_that_generate(trainer: str, folder: Path, tmp_path: Path, kept_patches: KeptPatches) -> None:
    options = arguments(tmp_path) | {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    learner = getattr(trl, f"{trainer}Trainer")(
        model=IVTPLlavaForConditionalGeneration.from_pretrained(folder),
        # Both hand every input of the processor to a function of fixed arguments.
        processing_class=AutoProcessor.from_pretrained(folder, clip_inputs=False),
        args=getattr(trl, f"{trainer}Config")(**options),
        reward_funcs=longest,
        train_dataset=dataset(**PROMPT),
    )
    learner.train()
    assert len(losses(learner)) == 2
    assert kept_patches.rows >= 3 * 4  # generation, the reference's log-probabilities, the policy's
