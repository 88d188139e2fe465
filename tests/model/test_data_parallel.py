"""Data-parallel training as people run it: no search for unused parameters, gradient checkpointing, several steps."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from tests.support.processes import free_port, one_of_two, row
from tests.support.tiny import IMAGE_TOKEN, prompt, tiny_model

ROWS = [[3, "image", 6], [3, "image", 6]]
STEPS = 3


def model_to_train(adapters):
    model = tiny_model()
    model.model.vision_tower.requires_grad_(False)  # as LLaVA is trained
    if adapters:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        # A pattern, as the vision tower is frozen; CLIP's text tower matches it and must not stop the step.
        model = get_peft_model(model, LoraConfig(target_modules=r".*(language_model|clip_text_model).*q_proj"))
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def batch(step):
    inputs = prompt(ROWS, seed=step)
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)}


def train(model, batches):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for inputs in batches:
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def one_trains(rank, port, adapters, out):
    with one_of_two(rank, port):
        model = model_to_train(adapters)
        train(DistributedDataParallel(model), [row(batch(step), rank) for step in range(STEPS)])
        if rank == 0:
            save_file({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, out)


@pytest.mark.subprocess
@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_two_processes_train_as_one_does_on_the_joint_batch(adapters, tmp_path):
    spawn(one_trains, (free_port(), adapters, tmp_path / "weights.safetensors"), nprocs=2)
    trained = load_file(tmp_path / "weights.safetensors")
    expected = model_to_train(adapters)
    before = {name: parameter.detach().clone() for name, parameter in expected.named_parameters()}
    train(expected, [batch(step) for step in range(STEPS)])
    changed = 0
    for name, parameter in expected.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name], parameter.detach(), atol=1e-5, rtol=1e-3)
            changed += not torch.equal(parameter, before[name])
    assert changed > 5
    assert not any("clip_text_model" in name or "visual_projection" in name for name in trained)
