"""Timing of training steps: paired, in alternating order, with memory that is counted and not guessed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training_speed
from benchmarks.peak_memory import PeakMemory
from benchmarks.training_speed import markdown, measure, train_step
from modeling_ivtp.speed.models import prompt
from modeling_ivtp.training.parts import PrunedBy
from tests.support.tiny import tiny_model


def test_arms_take_turns_and_pruned_steps_keep_less(monkeypatch: pytest.MonkeyPatch) -> None:
    model, order = tiny_model(), []
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    original, of = training_speed.train_step, training_speed.arm_of
    reachable = PrunedBy("atp-llava", None, {"target": 8}), ("pruner",)

    def noted(model: Any, name: str, *rest: Any) -> Any:
        order.append(name)
        return original(model, name, *rest)

    monkeypatch.setattr(training_speed, "train_step", noted)
    arms = ["unpruned", "fastv", "lvpruning", "atp-llava"]
    monkeypatch.setattr(
        training_speed, "arm_of", lambda name, tokens: reachable if name == arms[3] else of(name, tokens)
    )
    rows = measure(model, arms, tokens=4, batch=2, text_tokens=12, repeats=3)
    assert order == [*arms[::-1], *arms, *arms[::-1], *arms]
    unpruned, fastv, lvpruning, atp = rows
    assert unpruned["speed_up"] == [1.0, 1.0, 1.0]
    assert fastv["kept_bytes"] < unpruned["kept_bytes"]
    assert lvpruning["kept_bytes"] < unpruned["kept_bytes"]  # its base is frozen, and masks keep no attention map
    assert (fastv["final_tokens"], unpruned["final_tokens"]) == (4, 16)
    assert all(len(row["all"]) == 3 for row in rows)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    results = {
        "date": "2026-01-01", "model": "tiny", "note": "Shared.", "rows": rows,
        "machine": {"device": "x", "threads": 1}, "settings": {"batch": 2, "text_tokens": 12, "repeats": 3},
    }  # fmt: skip
    page = markdown(results)
    assert "| lvpruning (masks) | 4 |" in page
    assert "| atp-llava (masks) | by picture |" in page
    assert atp["final_tokens"] is None
    assert "| 1.00 [1.00, 1.00] |" in page
    assert json.loads(json.dumps(results)) == results


def test_what_is_kept_is_counted_once_and_without_the_weights() -> None:
    """A frozen head on a linear layer: autograd keeps the layer's input and the weights, which do not count."""
    model = tiny_model()
    inputs = prompt(model, batch=1, text_tokens=12, instruction_tokens=4)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = 3
    once, again = (train_step(model, "unpruned", 4, inputs, labels).kept_bytes for _ in range(2))
    assert once == again
    layers, width, length = 6, 32, 28
    assert once > 4 * layers * length * width * 6  # inputs of both norms, q, k, v and the MLP of every layer, at least
    assert once < sum(weight.nbytes for weight in model.parameters()) * 10
    double = {name: torch.cat([value, value]) for name, value in inputs.items()}
    twice = train_step(model, "unpruned", 4, double, torch.cat([labels, labels])).kept_bytes
    assert twice == pytest.approx(2 * once, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's peak anew")
def test_the_peak_of_a_process_is_what_it_held_at_once_beyond_what_it_held_before() -> None:
    held = torch.ones(8 * 2**20)  # 32 MiB, and twice as much is gone again
    torch.ones(16 * 2**20)
    with PeakMemory(torch.device("cpu")) as peak:
        for _ in range(3):
            torch.ones(32 * 2**20)  # 128 MiB, one after the other
    # A process does more than this work: other threads of its libraries hold memory too.
    assert peak.bytes == pytest.approx(128 * 2**20, abs=32 * 2**20)
    with PeakMemory(torch.device("cpu")) as nothing:
        held.sum()
    assert nothing.bytes is not None
    assert nothing.bytes < 32 * 2**20


def test_what_cannot_be_timed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for options, message in (
        ({"batch": 0}, "batch=0, repeats=7, text_tokens=32; allowed"),
        ({"arm": ["fastw"]}, "method='fastw'; allowed: unpruned"),
    ):
        with pytest.raises(ValueError, match=message):
            training_speed.main(**options, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
