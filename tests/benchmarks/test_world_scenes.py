"""Scenes of the quality world: where things stand, what patches show, and that they are the same everywhere."""

import hashlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality.world import (
    COLOURS,
    PATCH,
    SIDES,
    SPLITS,
    caption,
    draw_scene,
    kinds,
    object_range,
    pair_is_held_out,
    questions,
    scene_seed,
    sprites,
)

GOLDEN = "a7619393cd2e36ca"


def test_scenes_questions_and_captions_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(12):
            for side in (168, 336):
                scene = draw_scene(split, index, side)
                digest.update(scene.pixels.tobytes())
                digest.update(repr((scene.objects, questions(scene), caption(scene))).encode())
    assert digest.hexdigest()[:16] == GOLDEN


def test_a_scene_depends_on_nothing_drawn_before_it() -> None:
    alone = draw_scene("train", 5).pixels.copy()
    assert draw_scene("train", 4).pixels.any()
    questions(draw_scene("train", 5), 3)
    np.testing.assert_array_equal(draw_scene("train", 5).pixels, alone)


@pytest.mark.parametrize("side", SIDES)
def test_tiles_lie_inside_and_keep_their_distance(side: int) -> None:
    fewest, most = object_range(side)
    for index in range(60):
        scene = draw_scene("train", index, side)
        assert fewest <= len(scene.objects) <= most
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            assert min(left, top) >= 2
            assert max(right, bottom) <= side - 2
            assert 28 <= thing.size <= 64
        for one, other in combinations(scene.objects, 2):
            across = max(one.box[0] - other.box[2], other.box[0] - one.box[2])
            down = max(one.box[1] - other.box[3], other.box[1] - one.box[3])
            assert max(across, down) >= 4


@pytest.mark.parametrize("side", [168, 224, 336])
def test_tiles_of_crowded_scenes_lie_inside_side_by_side(side: int) -> None:
    cells = (side // 56) ** 2
    ground = []
    for index in range(40):
        scene = draw_scene("train", index, side, crowded=True)
        assert cells // 3 <= len(scene.objects) <= cells
        boxes = np.array([thing.box for thing in scene.objects])
        assert boxes.min() >= 0
        assert boxes.max() <= side
        covered = np.zeros((side, side), int)
        for left, top, right, bottom in boxes:
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1
        ground.append((covered == 0).mean())
        assert scene.objects != draw_scene("train", index, side).objects
    assert min(ground) < 0.25
    assert max(ground) > 0.5


def test_full_and_small_scenes_hold_the_numbers_promised() -> None:
    assert object_range(336) == (6, 12)
    assert object_range(168) == (2, 4)


def test_most_objects_are_small() -> None:
    sizes = [thing.size for index in range(300) for thing in draw_scene("train", index).objects]
    assert 0.85 < np.mean([size <= 50 for size in sizes]) < 0.97


@pytest.mark.slow
def test_every_kind_and_colour_is_drawn_about_equally_often() -> None:
    things = [thing for index in range(3000) for thing in draw_scene("test", index).objects]
    for values, options in (([t.kind for t in things], len(kinds())), ([t.colour for t in things], len(COLOURS))):
        share = np.bincount(values, minlength=options) / len(values) * options
        assert share.min() > 0.75
        assert share.max() < 1.25


def test_pixels_are_a_picture_of_the_objects() -> None:
    grounds = set()
    for index in range(40):
        scene = draw_scene("validation", index)
        assert scene.pixels.shape == (336, 336, 3)
        assert scene.pixels.dtype == np.uint8
        assert scene.pixels.flags.c_contiguous
        for thing in scene.objects:
            left, top, right, _bottom = thing.box
            strip = scene.pixels[top + 1, left + 12 : right - 12].astype(int)
            assert np.abs(strip.mean(axis=0) - sprites.RGB[thing.colour]).max() < 45
        grounds.add(tuple(scene.pixels[:2, :, :].mean(axis=(0, 1)).astype(int) // 16))
    assert len(grounds) > 15


def test_patch_labels_agree_with_counting_pixels() -> None:
    scene = draw_scene("train", 3)
    owner = np.full((336, 336), -1)
    for number, thing in enumerate(scene.objects):
        left, top, right, bottom = thing.box
        owner[top:bottom, left:right] = number
    found = scene.patch_objects()
    for row in range(24):
        for column in range(24):
            patch = owner[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            covered = [(patch == number).sum() for number in range(len(scene.objects))]
            assert scene.coverage[:, row, column].tolist() == covered
            assert found[row, column] == (np.argmax(covered) if max(covered) >= 98 else -1)
    on = found >= 0
    assert [scene.objects[n].kind for n in found[on]] == scene.patch_kinds()[on].tolist()
    assert [scene.objects[n].colour for n in found[on]] == scene.patch_colours()[on].tolist()
    assert (scene.patch_kinds()[~on] == -1).all()
    assert (scene.patch_colours()[~on] == -1).all()
    assert set(found[on]) == set(range(len(scene.objects)))


def test_splits_never_share_a_seed_and_held_out_pairs_only_occur_in_the_test() -> None:
    last = 999_999_999
    ranges = [(scene_seed(split, 0), scene_seed(split, last)) for split in SPLITS]
    assert all(one[1] < other[0] for one, other in combinations(sorted(ranges), 2))
    shown = {
        split: [pair_is_held_out(t.kind, t.colour) for i in range(1000) for t in draw_scene(split, i).objects]
        for split in SPLITS
    }
    assert not any(shown["train"])
    assert not any(shown["validation"])
    assert 0.04 < np.mean(shown["test"]) < 0.09


@pytest.mark.parametrize(("split", "index", "side"), [("dev", 0, 336), ("train", -1, 336), ("train", 10**9, 336)])
def test_unknown_splits_and_scenes_are_refused(split: str, index: int, side: int) -> None:
    with pytest.raises(ValueError, match=r"allowed are (train, validation, test|0 … 999999999)"):
        draw_scene(split, index, side)


@pytest.mark.parametrize("side", [0, 100, 335, 350, 154])
def test_sides_that_are_no_multiple_of_a_patch_are_refused(side: int) -> None:
    with pytest.raises(ValueError, match=rf"side={side} is not allowed; choose a multiple of 14: 168, 182, .*336"):
        draw_scene("train", 0, side)


def test_a_missing_sheet_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sprites, "WORLD", tmp_path)
    sprites._sheet.cache_clear()
    sprites.stamp.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match=r"sprites\.png.*build_sprites"):
            print(draw_scene("train", 0).pixels)
    finally:
        sprites._sheet.cache_clear()


def test_kinds_have_one_word_and_a_plural() -> None:
    names = [word for kind in kinds() for word in (kind.name, kind.plural)]
    assert len(kinds()) == 64
    assert len(set(names)) == 128
    assert all(word.isalpha() and word.islower() for word in names)
