"""Training recipes of the miniature: everything in which they differ.

`taught` made the miniature that ships. Labels accompany the tower at the top of every group, and attention to ground is
punished in the decoder, so that so small a model learns fast and survives pruning well.

`plain` is trained as CLIP and LLaVA are, as far as two cores allow: captions as a whole teach the tower, nothing
teaches the tops of groups, and attention is free. Each aid that it keeps is a field here. It was to do without help on
the way to an answer, too, but without it relations stood still on whole scenes (`benchmarks/README.md`).
"""

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.quality.loop import cosine_rate


@dataclass(frozen=True)
class TowerCourse:
    """Stage 1: both towers of CLIP.

    Attributes
    ----------
    steps : int
    small_steps : int
        How many of them, the first ones, run on small scenes of 168 pixels. Once patches are no longer taught, every
        second step does: of small scenes a batch holds more, and every text has more pictures to be told from.
    small_texts, texts : int
        Texts about each small scene and about each whole one; with 0, these steps learn from labels alone.
    question_share : float
        Share of texts that are a question about the scene, without its answer, in place of a caption.
    word_share : float
        Share of texts that are read at one of their words instead of at the end token.
    labelled_texts : bool
        Judge every pair of text and picture by itself, with the sigmoid loss, by the kinds that the text names. False:
        CLIP's own loss, in which a text fits the picture it was written about and no other of the batch.
    texts_weight : float
        Weight of the loss of texts.
    patches_after : tuple of int
        Layers after which patches are taught what they show. The last is where LLaVA reads them.
    patches_share : float
        Share of the steps, the first ones, in which patches are taught. The learning rate falls during these and then
        stays low: at higher rates captions quickly undo what the labels taught.
    cls_after : tuple of int
        Layers after which CLS is taught which kinds there are and where things are.
    """

    steps: int
    small_steps: int
    small_texts: int
    texts: int
    question_share: float
    word_share: float
    labelled_texts: bool
    texts_weight: float
    patches_after: tuple[int, ...]
    patches_share: float
    cls_after: tuple[int, ...]

    def draws_small(self, step: int) -> bool:
        """Return whether a step runs on small scenes."""
        return step < self.small_steps or (not self.teaches_patches(step) and step % 2 == 0)

    def teaches_patches(self, step: int) -> bool:
        """Return whether patches are taught what they show in a step."""
        return step < self._patches_steps

    def rate(self, step: int) -> float:
        """Return the share of the peak learning rates: a cosine while patches are taught, then its end."""
        return cosine_rate(min(step, self._patches_steps), self._patches_steps)

    @property
    def _patches_steps(self) -> int:
        return int(self.patches_share * self.steps)


@dataclass(frozen=True)
class Course:
    """Stages 2 and 3: the number of steps of each part, in order, and the aids on the way.

    Attributes
    ----------
    align : int
        Stage 2, on small scenes of 168 pixels.
    name : int
        Small scenes; every kind by its bare name.
    middle : int
        Scenes of 224 pixels; questions in their fewest words.
    whole : int
        Whole scenes; the same questions. Every third step keeps the smaller scenes, so that the model does not get
        used to one number of patches.
    sentences : int
        The same scenes; whole sentences, every second step with idle words around them.
    practice : int
        The same, every second step only with questions that relate two objects (see `related_from`).
    settle : int
        The same, with a cost on objects' attention to other objects, and the highest cost on the attention to ground
        of the token that answers.
    projector_alone : bool
        Train the projector alone in stage 2, as LLaVA does. False: the decoder's words move with it.
    alike_layers : int
        The number of first layers whose heads start out attending to tokens like themselves.
    named_after, source_after : int
        Layers after which bare names are read, and the place of the object named; and the place of the one that the
        answer is read from.
    places_weight : float
        Weight of the help on the way to an answer: those places, and the answer at the noun. 0: no help.
    places_until : float
        Share of the steps before the sentences after which there is no help; it fades out over the quarter before.
    related_from : int, optional
        The first step from which every second one asks only questions that relate two objects, which take longest to
        learn. `practice` begins with it at the latest; None: not before.
    idle_weight : float
        Cost of attention to ground. 0: attention is free.
    crowded : bool
        Crowd the smaller scenes of `practice` and `settle`, so that the model does not get used to one share of ground.
    """

    align: int
    name: int
    middle: int
    whole: int
    sentences: int
    practice: int
    settle: int
    projector_alone: bool
    alike_layers: int
    named_after: int
    source_after: int
    places_weight: float
    places_until: float
    related_from: int | None
    idle_weight: float
    crowded: bool

    @property
    def terse(self) -> int:
        """The number of steps before the first sentence."""
        return self.align + self.name + self.middle + self.whole

    @property
    def steps(self) -> int:
        """The number of all steps."""
        return self.terse + self.sentences + self.practice + self.settle

    def relates(self, step: int) -> bool:
        """Return whether a step asks only questions that relate two objects."""
        practice = self.terse + self.sentences
        first = practice if self.related_from is None else min(self.related_from, practice)
        return step >= first and step % 2 == 1

    def settling(self, step: int) -> bool:
        """Return whether a step belongs to the last part."""
        return step >= self.steps - self.settle

    def rate(self, step: int) -> float:
        """Return the share of the peak learning rates: a cosine, and half of one for each part after the terse ones."""
        if step < self.terse:
            return cosine_rate(step, self.terse)
        step -= self.terse
        for part in (self.sentences, self.practice, self.settle):
            if step < part:
                return 0.5 * cosine_rate(step, part)
            step -= part
        return 0.0

    def help(self, step: int) -> float:
        """Return the weight of the help: full at first, then fading out."""
        return self.places_weight * min(1.0, max(0.0, 4 * (self.places_until - step / self.terse)))


@dataclass(frozen=True)
class Recipe:
    """A model's depth, how it is pruned, and how it is trained.

    Attributes
    ----------
    name : str
    tower_layers, decoder_layers : int
    layers_per_group : int
    pruned_decoder_layers : int
        The number of first decoder layers in which pruning takes place.
    tower : TowerCourse
    course : Course
    """

    name: str
    tower_layers: int
    decoder_layers: int
    layers_per_group: int
    pruned_decoder_layers: int
    tower: TowerCourse
    course: Course

    @property
    def feature_layer(self) -> int:
        """The number of tower layers that LLaVA's features pass: all but one."""
        return self.tower_layers - 1

    @property
    def pruning(self) -> dict[str, Any]:
        """The pruning options of the checkpoint."""
        return {"layers_per_group": self.layers_per_group, "decoder_layers": self.pruned_decoder_layers}

    def with_steps(self, part: str, **steps: int | None) -> "Recipe":
        """Return the recipe with other numbers of steps in `tower` or `course`; None keeps the recipe's own."""
        changed = {name: number for name, number in steps.items() if number is not None}
        return replace(self, **{part: replace(getattr(self, part), **changed)})


TAUGHT = Recipe(
    name="taught",
    tower_layers=8,
    decoder_layers=12,
    layers_per_group=2,
    pruned_decoder_layers=8,
    tower=TowerCourse(
        steps=1800,
        small_steps=800,
        small_texts=0,
        texts=3,
        question_share=0.4,
        word_share=0.5,
        labelled_texts=True,
        texts_weight=0.1,
        patches_after=(2, 4, 6, 7),
        patches_share=1.0,
        cls_after=(2, 4, 6, 8),
    ),
    course=Course(
        align=200,
        name=400,
        middle=600,
        whole=900,
        sentences=700,
        practice=900,
        settle=500,
        projector_alone=False,
        alike_layers=4,
        named_after=2,
        source_after=4,
        places_weight=0.3,
        places_until=0.75,
        related_from=None,
        idle_weight=0.5,
        crowded=True,
    ),
)

PLAIN = Recipe(
    name="plain",
    tower_layers=12,
    decoder_layers=16,
    layers_per_group=3,
    pruned_decoder_layers=12,
    tower=TowerCourse(
        steps=1800,
        small_steps=900,
        small_texts=1,
        texts=3,
        question_share=0.2,
        word_share=0.0,
        labelled_texts=False,
        texts_weight=1.0,
        patches_after=(11,),
        patches_share=2 / 3,
        cls_after=(),
    ),
    course=Course(
        align=100,
        name=400,
        middle=600,
        whole=1150,
        sentences=300,
        practice=300,
        settle=0,
        projector_alone=True,
        alike_layers=4,
        named_after=8,
        source_after=12,
        places_weight=0.3,
        places_until=1.0,
        related_from=800,
        idle_weight=0.0,
        crowded=False,
    ),
)

RECIPES = {recipe.name: recipe for recipe in (TAUGHT, PLAIN)}


def recipe_named(name: str) -> Recipe:
    """Return the recipe of a name.

    Raises
    ------
    ValueError
        If there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r}; allowed: {', '.join(RECIPES)}.")
    return RECIPES[name]
