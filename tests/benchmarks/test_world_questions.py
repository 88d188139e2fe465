"""Questions, captions and the oracle of the quality world: they say what is there, and mark what matters."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.quality.world import (
    COLOURS,
    CORNERS,
    NUMBERS,
    RELATIONS,
    TYPES,
    Object,
    Question,
    Scene,
    all_words,
    answer_words,
    caption,
    chance,
    draw_scene,
    kinds,
    needed_patches,
    oracle_order,
    questions,
    sample_questions,
    triple_is_held_out,
)
from benchmarks.quality.world.wording import words_of

SCENES = [draw_scene("test", index) for index in range(150)]
ASKED = [(scene, question) for scene in SCENES for question in questions(scene)]


def named(question: Question) -> list[str]:
    return [question.text[start:stop] for start, stop, role in question.spans if role == "object"]


def the(scene: Scene, name: str) -> Object:
    """The only object of this name."""
    (found,) = [thing for thing in scene.objects if thing.name == name]
    return found


def beside(scene: Scene, subject: Object, relation: str) -> Object:
    """Who stands so to the subject: written from the words, not from the program."""
    others = [thing for thing in scene.objects if thing is not subject]
    if relation == "next_to":
        return min(others, key=lambda t: math.dist((t.x, t.y), (subject.x, subject.y)))
    along = {"left_of": (-1, 0), "right_of": (1, 0), "above": (0, -1), "below": (0, 1)}[relation]
    ahead = []
    for thing in others:
        forward = (thing.x - subject.x) * along[0] + (thing.y - subject.y) * along[1]
        aside = abs((thing.x - subject.x) * along[1]) + abs((thing.y - subject.y) * along[0])
        if forward > aside:
            ahead.append(thing)
    return min(ahead, key=lambda t: math.dist((t.x, t.y), (subject.x, subject.y)))


def right_answer(scene: Scene, question: Question) -> str:
    names = named(question)
    if question.type == "existence":
        return "yes" if any(thing.name == names[0] for thing in scene.objects) else "no"
    if question.type == "count":
        plurals = [thing for thing in scene.objects if kinds()[thing.kind].plural == names[0]]
        return NUMBERS[len(plurals) - 1]
    subject = the(scene, names[0])
    if question.type == "colour":
        return subject.colour_name
    if question.type == "corner":
        return ("south" if subject.y > 168 else "north") + ("east" if subject.x > 168 else "west")
    if question.type == "larger":
        return max((subject, the(scene, names[1])), key=lambda thing: thing.size).name
    found = beside(scene, subject, question.relation)
    return found.colour_name if question.type == "colour_of_neighbour" else found.name


@pytest.mark.parametrize("type", TYPES)
def test_answers_are_right(type: str) -> None:
    asked = [(scene, question) for scene, question in ASKED if question.type == type]
    assert len(asked) > 100
    for scene, question in asked:
        assert question.answer == right_answer(scene, question), (scene, question)
        assert question.answer in answer_words()


def test_all_types_are_covered_and_there_is_enough_to_ask() -> None:
    assert {question.type for _, question in ASKED} == set(TYPES)
    assert np.mean([len(questions(scene, 32)) for scene in SCENES]) > 30


def test_the_same_thing_is_asked_once() -> None:
    for scene in SCENES:
        asked = [(q.type, q.relation, q.subjects, tuple(sorted(named(q)))) for q in questions(scene)]
        assert len(asked) == len(set(asked))


def test_variants_differ_and_repeat_exactly() -> None:
    scene = SCENES[0]
    assert questions(scene, 9) == questions(scene, 9)
    assert questions(scene, 9) != questions(scene, 9, variant=1)
    assert caption(scene) == caption(scene)
    assert len({caption(scene, variant) for variant in range(8)}) > 5


def test_spans_mark_names_and_relations_in_question_and_prompt() -> None:
    for _, question in ASKED:
        assert question.prompt == f"USER: <image>\n{question.text} ASSISTANT:"
        assert any(role == "object" for _, _, role in question.spans)
        for inner, outer in zip(question.spans, question.prompt_spans, strict=True):
            word = question.text[inner.start : inner.stop]
            assert question.prompt[outer.start : outer.stop] == word
            assert word.replace(" ", "").isalpha()
            assert not set(word) & set("<>{}")
        assert not set(question.text) & set("<>{}")
        names = {name for kind in kinds() for name in (kind.name, kind.plural)}
        assert all(name in names for name in named(question))


def test_the_vocabulary_is_complete() -> None:
    words = set(all_words())
    assert all(set(words_of(question.text)) <= words for _, question in ASKED)
    assert set(answer_words()) >= {"yes", "no", *NUMBERS, *COLOURS, *CORNERS, *(kind.name for kind in kinds())}


def test_wording_varies() -> None:
    texts = [question.text for _, question in ASKED if question.type == "colour"]
    assert len({text.replace(named(q)[0], "") for text, (_, q) in zip(texts, ASKED, strict=False)}) > 100


def test_held_out_triples_are_asked_only_in_the_test() -> None:
    for split in ("train", "validation"):
        for index in range(200):
            scene = draw_scene(split, index)
            for question in questions(scene):
                assert question.held_out == ""
                if question.type in RELATIONS:
                    other = scene.objects[question.sources[0]].kind
                    assert not triple_is_held_out(question.relation, scene.objects[question.subjects[0]].kind, other)
    kept = [question.held_out for _, question in ASKED if question.type in RELATIONS]
    assert 0.05 < np.mean([reason == "triple" for reason in kept]) < 0.16
    assert {reason for _, question in ASKED for reason in [question.held_out]} == {"", "pair", "triple"}


def test_a_triple_shares_the_fate_of_its_other_end() -> None:
    for one in range(20):
        for other in range(one):
            assert triple_is_held_out("left_of", one, other) == triple_is_held_out("right_of", other, one)
            assert triple_is_held_out("above", one, other) == triple_is_held_out("below", other, one)
            for relation in ("next_to", "larger"):
                assert triple_is_held_out(relation, one, other) == triple_is_held_out(relation, other, one)


def test_samples_are_even_over_types_and_take_a_scene_once() -> None:
    sample = list(sample_questions("test", 110))
    assert all(sum(q.type == type for _, q in sample) == 10 for type in TYPES)
    assert len({scene.index for scene, _ in sample}) == 110
    assert all(q.held_out for _, q in sample_questions("test", 20, held_out=True, start=500))
    assert not any(q.held_out for _, q in sample_questions("test", 50, held_out=False))


@pytest.mark.parametrize("side", [168, 252])
def test_small_canvases_have_questions_too(side: int) -> None:
    asked = [q for index in range(100) for q in questions(draw_scene("train", index, side))]
    assert {question.type for question in asked} == set(TYPES)


@pytest.mark.parametrize(
    "call",
    [
        lambda: questions(SCENES[0], types=["taste"]),
        lambda: chance("taste"),
        lambda: next(sample_questions("test", 1, ["taste"])),
    ],
)
def test_unknown_types_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"'taste'; allowed are existence, count, colour"):
        call()


def test_held_out_questions_of_training_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'train' has no held-out questions"):
        next(sample_questions("train", 1, held_out=True))


def test_no_types_are_refused() -> None:
    with pytest.raises(ValueError, match="No question types"):
        questions(SCENES[0], types=[])


def test_captions_tell_what_is_there_and_fit_into_clip() -> None:
    encode = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer().encode
    words = {name: kind for kind in kinds() for name in (kind.name, kind.plural)}
    for scene in SCENES:
        for variant in range(12):
            text = caption(scene, variant)
            assert len(encode(text)) <= 60
            said = {words[word] for word in words_of(text) if word in words}
            assert said
            assert said <= {kinds()[thing.kind] for thing in scene.objects}


def test_a_plain_caption_counts() -> None:
    texts = [caption(scene, variant) for scene in SCENES for variant in range(4)]
    assert any(" two " in text or text.startswith("two ") for text in texts)
    assert any("tile at the top left" in text for text in texts)


def test_the_oracle_needs_what_is_asked_about() -> None:
    for scene, question in ASKED[::7]:
        needed = needed_patches(scene, question)
        asked = question.subjects + question.sources
        everything = question.type == "count" or not asked
        wanted = range(len(scene.objects)) if everything else asked
        assert needed.shape == (24, 24)
        np.testing.assert_array_equal(needed, (scene.coverage[list(wanted)] >= 49).any(axis=0))


def test_the_oracle_orders_all_patches_by_need() -> None:
    for scene, question in ASKED[::7]:
        order = oracle_order(scene, question)
        assert sorted(order.tolist()) == list(range(576))
        needed = needed_patches(scene, question).reshape(-1)
        assert needed[order[: needed.sum()]].all()
        others = (scene.coverage >= 49).any(axis=0).reshape(-1) & ~needed
        assert others[order[576 - others.sum() :]].all()


def test_a_small_budget_shows_the_middle_of_every_object_to_be_counted() -> None:
    for scene, question in ASKED:
        if question.type == "count":
            first = oracle_order(scene, question)[: len(question.subjects)]
            for thing in (scene.objects[number] for number in question.subjects):
                away = np.maximum(abs(first // 24 * 14 + 7 - thing.y), abs(first % 24 * 14 + 7 - thing.x))
                assert away.min() <= 7


def test_styles_ask_the_same_in_more_and_in_fewer_words() -> None:
    scene = draw_scene("train", 5)
    full, plain, terse = (questions(scene, style=style) for style in ("full", "plain", "terse"))

    def lengths(asked: list[Question]) -> float:
        return sum(len(one.text.split()) for one in asked) / len(asked)

    assert lengths(full) > lengths(plain) + 3
    assert lengths(plain) > lengths(terse) + 3
    for asked in (full, plain, terse):
        assert {one.type for one in asked} == {one.type for one in full}
        for one in asked:
            assert any(span.role == "object" for span in one.spans)
    with pytest.raises(ValueError, match="style 'short'; allowed are full, plain, terse"):
        questions(scene, style="short")
