"""The patches that a question needs, which an oracle keeps."""

import numpy as np

from benchmarks.quality.world.questions import Question
from benchmarks.quality.world.scenes import PATCH, Scene

LEAST = 0.25
"""Share of a patch that a tile must cover for the patch to be needed."""


def needed_objects(scene: Scene, question: Question) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the numbers of the objects that a question is about or is answered from, and of those to be ruled out.

    To say that something is missing, or how many there are, one has to look at everything.
    """
    asked = question.subjects + question.sources
    if question.type == "count" or not asked:
        return asked, tuple(number for number in range(len(scene.objects)) if number not in asked)
    return asked, ()


def shown_patches(scene: Scene) -> np.ndarray:
    """Return the patches that show each object, where its tile covers at least a quarter: (objects, grid²) bool."""
    return (scene.coverage >= LEAST * PATCH * PATCH).reshape(len(scene.objects), -1)


def needed_patches(scene: Scene, question: Question) -> np.ndarray:
    """Return the patches that show a needed object, (grid, grid) bool."""
    asked, others = needed_objects(scene, question)
    return shown_patches(scene)[list(asked + others)].any(axis=0).reshape(scene.grid, scene.grid)


def oracle_order(scene: Scene, question: Question) -> np.ndarray:
    """Return all patches in the order in which an oracle keeps them, (grid²,) int64; its first k fill a budget of k.

    First come the patches of the objects that the question is about or is answered from: the objects take turns, each
    with its most central patch first. Then those of objects to be ruled out, likewise; then the ground, from the needed
    objects outward; then all other objects, likewise, because parts of unrelated objects are worse than nothing.
    Patches are numbered row by row.
    """
    asked, others = needed_objects(scene, question)
    level = np.full(len(scene.objects), 2)
    level[list(others)] = 1
    level[list(asked)] = 0
    middle = np.arange(scene.grid) * PATCH + PATCH // 2
    x = np.array([thing.x for thing in scene.objects])[:, None, None]
    y = np.array([thing.y for thing in scene.objects])[:, None, None]
    distance = ((middle[None, None, :] - x) ** 2 + (middle[None, :, None] - y) ** 2).reshape(len(level), -1)
    covered = shown_patches(scene)

    far = 4 * scene.side**2
    turn = np.where(covered, distance, far).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    # Level before turn before distance, as one integer; a patch counts for the first object that claims it.
    last = 4 * scene.grid**2 * far
    needed = covered & (level < 2)[:, None]
    claim = np.where(needed, (level[:, None] * scene.grid**2 + turn) * far + distance, last).min(axis=0)
    claim[(claim == last) & covered.any(axis=0)] += 1
    wanted = level == level.min()
    return np.lexsort((np.arange(scene.grid**2), distance[wanted].min(axis=0), claim))
