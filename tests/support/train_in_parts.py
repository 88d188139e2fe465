"""A short training of the miniature's decoder, alone or as one of several processes that torchrun started."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.quality import processes
from benchmarks.quality.loop import TrainingRun, optimize, optimizers_of, set_up
from benchmarks.quality.question_batches import ask
from benchmarks.quality.recipes import PLAIN
from benchmarks.quality.speaker import Speaker
from benchmarks.quality.train_llava import MUON, NO_CORNERS, losses

PICTURES = 4


def train(out: Path, rows: slice | None = None) -> None:
    """Make three steps on `rows` of the pictures, by default this process's share, and save the weights."""
    device = set_up(0, 1)
    speaker = Speaker(replace(PLAIN, decoder_layers=2)).to(device)
    optimizers = optimizers_of(speaker, MUON)
    run = TrainingRun(out, speaker, optimizers, {})
    rows = processes.share(PICTURES) if rows is None else rows

    def one_step(step: int) -> dict[str, float]:
        batch = ask(step, PICTURES, 4, NO_CORNERS, side=168)
        features = torch.randn(PICTURES, 144, 192, generator=torch.Generator().manual_seed(step))
        values = losses(speaker, features[rows].to(device), batch.part(rows), PLAIN.course, PLAIN.course.terse)
        return optimize(speaker, optimizers, values, 1.0)

    run.train(3, one_step, title="LLaVA")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
