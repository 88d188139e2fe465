"""The demonstration: three questions about one scene, and a picture of what was kept for each."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality.world import PATCH, RELATIONS, draw_scene
from examples import demo
from examples.demo_picture import Kept, draw
from modeling_ivtp.serving.answering import Answer
from tests.support.untaught import PATCHES, untaught


def test_the_questions_are_of_three_sorts_and_about_different_things():
    apart = 0
    for index in range(20):
        scene = draw_scene("test", index)
        chosen = colour, relation, place = demo.choose_questions(scene)
        assert colour.type == "colour"
        assert relation.type in RELATIONS
        assert place.type in ("corner", "existence")
        apart += len({question.subjects for question in chosen}) == 3
    assert apart > 15


@pytest.mark.slow
def test_every_question_is_answered_at_every_budget_and_drawn(tmp_path, capsys):
    model = untaught(tmp_path / "model")
    demo.main(out=tmp_path / "new" / "demo.png", scene=3, model=model, repeats=0)
    with Image.open(tmp_path / "new" / "demo.png") as picture:
        assert picture.width > 800
    output = capsys.readouterr().out
    for tokens in (PATCHES, *demo.BUDGETS):
        assert f" {tokens} " in output


def test_the_picture_dims_what_was_dropped_and_nothing_else():
    scene = draw_scene("test", 3, side=168)
    vars(scene)["pixels"] = np.full((168, 168, 3), 200, np.uint8)
    question = demo.choose_questions(scene)[0]
    answer = Answer("red", 1, 0.1, (1,), 1.0, 10)
    figure = draw(scene, [(question, [Kept(list(range(144)), answer, True), Kept([0], answer, False)])])
    whole, pruned = (axes.images[0].get_array() for axes in figure.axes)
    cell = whole.shape[0] // (168 // PATCH)
    np.testing.assert_allclose(whole, 200 / 255, atol=1e-6)
    np.testing.assert_allclose(pruned[:cell, :cell], 200 / 255, atol=1e-6)
    assert pruned[cell:].max() < 0.5
    colours = [text.get_color() for text in figure.texts if text.get_text() == "red"]
    assert len(set(colours)) == 2
    left, top, _, bottom = scene.objects[question.subjects[0]].box
    for axes in figure.axes:
        (frame,) = axes.patches
        assert frame.get_xy() == (left - 3, top - 3)
        assert frame.get_height() == bottom - top + 6


@pytest.mark.slow
def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(OSError, match="no config"):
        demo.main(out=tmp_path / "demo.png", scene=3, model=tmp_path, repeats=0)
    assert not (tmp_path / "demo.png").exists()
