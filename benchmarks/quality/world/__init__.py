"""A drawn world for measuring whether a model sees: scenes, questions, captions, and labels for every patch.

    scene = draw_scene("train", 7)                 # objects; scene.pixels is (336, 336, 3) uint8
    scene.patch_kinds(), scene.patch_colours()     # (24, 24), -1 where there is no object
    questions(scene, 32)                           # Question.prompt, .answer, .type, .prompt_spans
    caption(scene)                                 # for CLIP
    oracle_order(scene, question)[:64]             # the patches to keep
    for scene, question in sample_questions("test", 2000): ...

Everything is computed in integers from PCG64's raw bits, so the world is the same on every machine.
"""

from benchmarks.quality.world.captions import caption
from benchmarks.quality.world.needed import needed_objects, needed_patches, oracle_order, shown_patches
from benchmarks.quality.world.questions import (
    CORNERS,
    NUMBERS,
    TYPES,
    Question,
    answer_words,
    chance,
    questions,
    sample_questions,
)
from benchmarks.quality.world.scenes import (
    GREY,
    GRID,
    PATCH,
    SIDE,
    SIDES,
    SIZES,
    Object,
    Scene,
    draw_scene,
    object_range,
)
from benchmarks.quality.world.splits import SPLITS, pair_is_held_out, scene_seed, triple_is_held_out
from benchmarks.quality.world.sprites import COLOURS, Kind, article, fingerprint, kinds
from benchmarks.quality.world.wording import RELATIONS, Span, all_words

__all__ = [
    "COLOURS",
    "CORNERS",
    "GREY",
    "GRID",
    "NUMBERS",
    "PATCH",
    "RELATIONS",
    "SIDE",
    "SIDES",
    "SIZES",
    "SPLITS",
    "TYPES",
    "Kind",
    "Object",
    "Question",
    "Scene",
    "Span",
    "all_words",
    "answer_words",
    "article",
    "caption",
    "chance",
    "draw_scene",
    "fingerprint",
    "kinds",
    "needed_objects",
    "needed_patches",
    "object_range",
    "oracle_order",
    "pair_is_held_out",
    "questions",
    "sample_questions",
    "scene_seed",
    "shown_patches",
    "triple_is_held_out",
]
