"""Time a training step pruned against not, in interleaved pairs, and count what it keeps for the backward pass.

    python -m benchmarks.training_speed --model examples/miniature --arm ivtp --arm lvpruning --batch 4

IVTP's abstract says that pruning accelerates training. A step here is forward and backward of one batch, with the
projector and the language model learning, or the modules of a trained pruner as its paper trains it; the optimizer's
part is the same for all and left out. All arms see the same batch, and each repeat runs all arms, in alternating order.
Memory is what autograd keeps between forward and backward, counted without repetition: it does not depend on what else
the machine does. The peak is what the process (on a GPU: its tensors) held at once beyond what it held before the step.
"""

import datetime
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.peak_memory import PeakMemory
from benchmarks.quality import command
from benchmarks.quality.report import write_atomically
from modeling_ivtp.files.console import quiet, steps_bar
from modeling_ivtp.files.sizes import human_bytes
from modeling_ivtp.files.tables import markdown_table
from modeling_ivtp.methods.names import UNPRUNED
from modeling_ivtp.serving.answering import load_model
from modeling_ivtp.speed.bench import machine
from modeling_ivtp.speed.models import prompt
from modeling_ivtp.speed.timing import ratio
from modeling_ivtp.trained import TRAINED
from modeling_ivtp.training.parts import PrunedBy, training_module

PARTS = ("projector", "language_model")
WARM_UPS = 1
OUT = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Step:
    """The cost of one step.

    Attributes
    ----------
    seconds : float
    kept_bytes : int
        Tensors that autograd keeps, each storage once.
    peak_bytes : int or None
        As of `PeakMemory`.
    """

    seconds: float
    kept_bytes: int
    peak_bytes: int | None


def arm_of(name: str, tokens: int) -> tuple[PrunedBy, tuple[str, ...]]:
    """Return what prunes in an arm, and what learns of the model."""
    if name not in TRAINED:
        return PrunedBy(name, None if name == UNPRUNED else tokens), PARTS
    kind = TRAINED[name]
    own = tokens if "keep" in kind.budgets else None
    return PrunedBy(name, own), (*(PARTS if kind.trains else ()), "pruner")


def train_step(model: Any, name: str, tokens: int, inputs: dict[str, Any], labels: torch.Tensor) -> Step:
    """Run one step of an arm: forward and backward."""
    pruned_by, learns = arm_of(name, tokens)
    device = model.device
    torch.manual_seed(0)
    with training_module(model, pruned_by, learns) as module:
        module.train()
        kept: dict[int, int] = {}
        wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with PeakMemory(device) as peak:
            wait()
            start = time.perf_counter()
            with saved_tensors_hooks(note, lambda tensor: tensor):
                loss = module(**inputs, labels=labels).loss
            loss.backward()
            wait()
            seconds = time.perf_counter() - start
        for weight in module.parameters():
            weight.grad = None
        module.eval()
    return Step(seconds, sum(kept.values()), peak.bytes)


def measure(
    model: Any,
    arms: Sequence[str],
    *,
    tokens: int,
    batch: int,
    text_tokens: int,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Run all arms in every repeat, and return a row for each: seconds, ratio to unpruned, bytes."""
    inputs = prompt(model, batch=batch, text_tokens=text_tokens, instruction_tokens=max(1, text_tokens - 8))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    steps: dict[str, list[Step]] = {name: [] for name in arms}
    for repeat in range(WARM_UPS + repeats):
        for name in arms if repeat % 2 else reversed(arms):
            step = train_step(model, name, tokens, inputs, labels)
            advance()
            if repeat >= WARM_UPS:
                steps[name].append(step)
    baseline = [step.seconds for step in steps[UNPRUNED]]
    rows, layers = [], model.config.text_config.num_hidden_layers
    for name in arms:
        seconds = [step.seconds for step in steps[name]]
        plan = arm_of(name, tokens)[0].plan(model.config)
        peaks = [step.peak_bytes for step in steps[name] if step.peak_bytes is not None]
        rows.append(
            {
                "arm": name,
                "milliseconds": 1e3 * float(np.median(seconds)),
                "speed_up": list(ratio(baseline, seconds)),
                "kept_bytes": steps[name][-1].kept_bytes,
                "peak_bytes": int(np.median(peaks)) if peaks else None,
                # A method that adapts the number to the picture has none to plan.
                "final_tokens": plan.final_tokens if plan.exact else None,
                "layer_averaged_tokens": plan.layer_average(layers) if plan.exact else None,
                "masked": name in TRAINED,
                "all": [round(value, 4) for value in seconds],
            }
        )
    return rows


def markdown(results: dict[str, Any]) -> str:
    """Return the page of results."""
    kept = next(row["kept_bytes"] for row in results["rows"] if row["arm"] == UNPRUNED)
    lines = [
        (
            row["arm"] + (" (masks)" if row["masked"] else ""),
            "by picture" if row["final_tokens"] is None else f"{row['final_tokens']:g}",
            "" if row["final_tokens"] is None else f"{row['layer_averaged_tokens']:.1f}",
            f"{row['milliseconds']:.0f}",
            "{:.2f} [{:.2f}, {:.2f}]".format(*row["speed_up"]),
            human_bytes(row["kept_bytes"]),
            f"{kept / row['kept_bytes']:.2f}",
            *([human_bytes(row["peak_bytes"])] if row["peak_bytes"] is not None else []),
        )
        for row in results["rows"]
    ]
    peak = ["peak"] if any(row["peak_bytes"] is not None for row in results["rows"]) else []
    settings = results["settings"]
    return "\n".join(
        [
            f"# A training step, {results['date']}\n",
            f"{results['model']}: forward and backward of {settings['batch']} conversations with "
            f"{settings['text_tokens']} text tokens and a picture each, {settings['repeats']} interleaved repeats on "
            f"{results['machine']['device']}, {results['machine']['threads']} thread(s). {results['note']}\n",
            markdown_table(
                ("system", "final tokens", "layer-averaged", "ms a step", "times faster than unpruned",
                 "kept for backward", "times less", *peak),
                lines,
            ),
            "Systems with masks keep all tokens in training and drop them at inference alone.\n",
        ]
    )  # fmt: skip


def main(
    model: Annotated[Path, typer.Option(help="A checkpoint.")] = Path("examples/miniature"),
    arm: Annotated[list[str] | None, typer.Option(help="Methods; may be repeated.", show_default="five")] = None,
    tokens: Annotated[int, typer.Option(help="Visual tokens that they keep in the end.")] = 64,
    batch: Annotated[int, typer.Option(help="Conversations of a step.")] = 4,
    text_tokens: Annotated[int, typer.Option(help="Text tokens of each.")] = 32,
    repeats: Annotated[int, typer.Option(help="Pairs.")] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    note: Annotated[str, typer.Option(help="What else is to be known, such as other work on the machine.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = OUT,
) -> None:
    """Time training steps."""
    arms = list(dict.fromkeys([UNPRUNED, *(arm or ["evit", "ivtp", "fastv", "lvpruning", "atp-llava"])]))
    if batch < 1 or repeats < 1 or text_tokens < 4:
        raise ValueError(f"batch={batch}, repeats={repeats}, text_tokens={text_tokens}; allowed: at least 1, 1 and 4.")
    torch.set_num_threads(threads)
    loaded, _ = load_model(model, device=device, dtype="float32")
    for name in arms:
        arm_of(name, tokens)[0].plan(loaded.config)  # what does not fit is refused before anything is timed
    with quiet(), steps_bar((WARM_UPS + repeats) * len(arms), "training", True) as advance:
        rows = measure(
            loaded, arms, tokens=tokens, batch=batch, text_tokens=text_tokens, repeats=repeats, advance=advance
        )
    date = datetime.date.today().isoformat()
    results = {
        "date": date,
        "model": model.resolve().name,
        "settings": {"tokens": tokens, "batch": batch, "text_tokens": text_tokens, "repeats": repeats},
        "machine": machine(loaded.device),
        "note": note,
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"training-speed-{date}.json"
    write_atomically(file, (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(file.with_suffix(".md"), markdown(results).encode())
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    command.run(main)
