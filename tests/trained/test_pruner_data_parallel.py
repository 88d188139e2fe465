"""Data-parallel training of a pruner: two processes learn what one learns on the joint batch."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from modeling_ivtp import trained
from tests.support.processes import free_port, one_of_two, row
from tests.support.tiny import tiny_model
from tests.support.trained import answered, ready

ROWS = [[3, "image", 6], [3, "image", 6]]
STEPS = 2
METHODS = {
    "lvpruning": trained.LVPruning(ratio=0.5, straight_through=False),
    "atp-llava": trained.ATPLLaVA(target=4),
    # One process is above the target and the other below: their own distances would pull in opposite directions.
    "atp-llava, two sides": trained.ATPLLaVA(target=6.9, target_weight=2.0),
    "sparse-attention": trained.SparseAttention(keep=4, layers=(2, 4), fuse=2, sparsity_weight=0.5),
}


def training_of(name):
    model = tiny_model()
    training = trained.PrunerTraining(model, ready(METHODS[name], model))
    training.gradient_checkpointing_enable({"use_reentrant": False})
    return training.train()


def train(model, batches):
    torch.nn.functional.gumbel_softmax = lambda logits, tau, hard: (logits / tau).softmax(-1)  # the same for all
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for inputs in batches:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def one_trains(rank, port, name, out):
    with one_of_two(rank, port):
        training = training_of(name)
        # No search for unused parameters: everything that is to learn has a gradient in every step.
        train(DistributedDataParallel(training), [row(answered(ROWS, seed=step), rank) for step in range(STEPS)])
        if rank == 0:
            save_file(training.state_dict(), out)


@pytest.mark.subprocess
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one_does_on_the_joint_batch(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", None)  # restored after `train` replaced it
    spawn(one_trains, (free_port(), name, tmp_path / "weights.safetensors"), nprocs=2)
    found = load_file(tmp_path / "weights.safetensors")
    expected = training_of(name)
    before = {key: value.clone() for key, value in expected.state_dict().items()}
    train(expected, [answered(ROWS, seed=step) for step in range(STEPS)])
    after = expected.state_dict()
    assert found.keys() == after.keys()
    for key, value in after.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-3)
    changed = [key for key, value in after.items() if (value - before[key]).abs().max() > 1e-5]
    of_modules = [key for key in after if key.startswith("learned.")]
    assert len(set(of_modules) & set(changed)) > min(5, len(of_modules) - 1)
    expected.release()


@torch.no_grad()
def test_the_two_sides_are_two_sides():
    method = METHODS["atp-llava, two sides"]
    training = training_of("atp-llava, two sides")
    distances = []
    for rank in range(2):
        training(**row(answered(ROWS, seed=0), rank))
        counts = [float(weighed.counts.mean()) for weighed in training.method.batch.weighed]
        distances.append((16 + 2 * counts[0] + counts[1] + 2 * counts[2]) / 6 - method.target)
    assert distances[0] < -0.05 < 0.05 < distances[1]
    training.release()
