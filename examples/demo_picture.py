"""The demonstration's picture: a row for each question, with what was kept of the scene to answer it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.quality.world import Question, Scene, needed_objects
from modeling_ivtp.model.trace_plot import dim, square
from modeling_ivtp.serving.answering import Answer

_INK, _MUTED, _RIGHT, _WRONG = "#1c2128", "#656d76", "#1a7f37", "#cf222e"
_GAP = 3
"""Pixels between an object and its frame."""


@dataclass(frozen=True)
class Kept:
    """An answer, the patches that it rests on, and whether it is right."""

    patches: list[int]
    answer: Answer
    right: bool


def draw(scene: Scene, asked: Sequence[tuple[Question, Sequence[Kept]]]) -> Figure:
    """Draw a row of panels for every question: the whole picture, then what was kept at each budget.

    The objects that a question is about, and those that its answer rests on, are framed.

    Parameters
    ----------
    scene : Scene
    asked : sequence of (Question, sequence of Kept)
    """
    grid = scene.grid
    picture = square(scene.pixels, (grid, grid))
    columns = len(asked[0][1])
    side, head, foot, margin = 3.0, 0.62, 0.42, 0.3
    width = columns * side + (columns + 1) * margin
    height = len(asked) * (side + head + foot) + margin
    figure = Figure((width, height), dpi=110, facecolor="white")
    for row, (question, answers) in enumerate(asked):
        top = height - margin / 2 - row * (side + head + foot)
        boxes = [scene.objects[number].box for number in needed_objects(scene, question)[0]]
        figure.text(margin / width, (top - 0.36) / height, question.text, color=_INK, fontsize=17, fontweight="bold")
        for column, kept in enumerate(answers):
            left, bottom = margin + column * (side + margin), top - head - side
            axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
            axes.set_axis_off()
            mask = torch.zeros(grid * grid, dtype=torch.bool)
            mask[kept.patches] = True
            extent = (0, scene.side, scene.side, 0)
            axes.imshow(dim(picture, mask.view(grid, grid)), interpolation="antialiased", extent=extent)
            for x0, y0, x1, y1 in boxes:
                corner, wide, high = (x0 - _GAP, y0 - _GAP), x1 - x0 + 2 * _GAP, y1 - y0 + 2 * _GAP
                axes.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor="white", linewidth=2))
            answer = kept.answer
            count = f"{'' if column else 'all '}{answer.visual_tokens[0]} visual tokens"
            y = (bottom - 0.24) / height
            figure.text(left / width, y, count, color=_MUTED, fontsize=11)
            figure.text(
                (left + side) / width, y, answer.text, color=_RIGHT if kept.right else _WRONG, fontsize=13,
                fontweight="bold", ha="right",
            )  # fmt: skip
    return figure
