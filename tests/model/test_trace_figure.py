"""The picture of what was pruned."""

import dataclasses
import math
import pickle
import sys
import warnings
from itertools import combinations

import numpy as np
import pytest
import torch

from modeling_ivtp.model.trace import GroupTrace, ImageTrace
from tests.support.traces import COFFEE, QUESTION, image_trace, pruning_trace, spell

pytest.importorskip("matplotlib", reason="plots need matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


@pytest.fixture
def trace():
    return pruning_trace()


@pytest.fixture(autouse=True)
def no_pyplot_figure_is_left():
    yield
    import matplotlib.pyplot

    assert not matplotlib.pyplot.get_fignums()


def draw(figure):
    """Render with every warning an error; check that words lie inside the figure, on no panel and on no other word."""
    assert isinstance(figure, Figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = [text.get_window_extent(canvas.get_renderer()).padded(-1.5) for text in texts(figure)]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    panels = [axes.bbox.padded(-1.5) for axes in figure.axes]
    for box, other in [*combinations(boxes + panels, 2)]:
        assert not box.overlaps(other), (box, other)
    return np.asarray(canvas.buffer_rgba())


def texts(figure):
    """All that is written: above the panels and below them, and what belongs to one panel."""
    return [text for part in (*figure.artists, *figure.axes) for text in part.findobj(Text) if text.get_text()]


def words(figure):
    return " ".join(text.get_text() for text in texts(figure))


def pixels(axes):
    """What a panel shows, one value per patch."""
    shown = np.asarray(axes.images[0].get_array())
    columns, rows = axes.images[0].get_extent()[1:3]
    cell = shown.shape[0] // int(rows)
    return shown.reshape(int(rows), cell, int(columns), cell, 3)[:, cell // 2, :, cell // 2].reshape(-1, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "tower", "decoder"),
    [((24, 24), 8, 4), ((24, 24), 0, 1), ((4, 4), 1, 0), ((4, 4), 2, 3), ((3, 5), 1, 1)],
)
def test_every_shape_of_trace_is_drawn(grid, tower, decoder):
    patches = grid[0] * grid[1]
    image = image_trace(grid, (max(2, patches // 4), tower), (max(1, patches // 9), decoder))
    figure = pruning_trace(image).plot(COFFEE, stages="all")
    draw(figure)
    assert len(figure.axes) == 1 + tower + decoder
    for axes in figure.axes:
        assert axes.bbox.width / axes.bbox.height == pytest.approx(grid[1] / grid[0])


def test_every_panel_dims_what_its_group_dropped(trace):
    figure = trace.plot(COFFEE)
    whole = pixels(figure.axes[0])
    groups = trace.images[0].groups
    for axes, group in zip(figure.axes[1:], (groups[7], groups[9], groups[11]), strict=True):
        untouched = (pixels(axes) == whole).all(1)
        np.testing.assert_array_equal(untouched, np.isin(np.arange(576), group.kept))


def test_kept_regions_are_outlined_without_inner_lines():
    group = GroupTrace("tower", (0, 2), torch.arange(16), torch.full((16,), 1 / 16), torch.tensor([5, 6, 9, 10]))
    figure = pruning_trace(ImageTrace(0, (4, 4), (group,), (), "pseudo_cls")).plot(COFFEE)
    segments = {tuple(map(tuple, segment)) for segment in figure.axes[1].collections[0].get_segments()}
    assert segments == {((1, 1), (3, 1)), ((1, 3), (3, 3)), ((1, 1), (1, 3)), ((3, 1), (3, 3))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "pieces",
    [
        ["▁word"] * 300,
        ["▁" + "unbreakable" * 40],
        [*"墙上有几个钟，请用一句话回答？"] * 12,
        ["▁Wo", "▁ist", "▁🐶", "▁👩‍🚀", "▁😀", "\x07", "▁$x_1$", "▁\\frac{1}{2}", "▁%", "▁\n", "▁สวัสดี", "▁مرحبا"],
        ["▁"],
    ],
    ids=["long", "unbreakable", "chinese", "odd", "blank"],
)
@pytest.mark.parametrize("stages", [None, [-1]], ids=["wide", "narrow"])
def test_any_text_is_set_without_overlap_or_warning(pieces, stages, recwarn):
    image = image_trace(tokens=spell(pieces, set(range(0, len(pieces), 3))))
    figure = pruning_trace(image).plot(COFFEE, stages=stages, title="".join(pieces).replace("▁", " "))
    draw(figure)
    assert ("…" in words(figure)) == (len("".join(pieces)) > 100)
    assert not recwarn.list


def test_key_words_are_tinted_by_relevance():
    tokens = spell(["▁a", "▁cat", "▁and", "▁a", "▁dog"], {1, 4})
    figure = pruning_trace(image_trace(tokens=tokens)).plot(COFFEE)
    draw(figure)
    question = [text for text in texts(figure) if text.get_window_extent().y0 > figure.axes[0].bbox.y1]
    marks = [text.get_bbox_patch() for text in question if text.get_bbox_patch()]
    places = [text.get_window_extent() for text in question if text.get_text() in ("cat", "dog")]
    assert len(marks) == len(places) == 2
    for mark, place in zip(marks, places, strict=True):
        box = mark.get_window_extent()
        assert box.x0 <= place.x0
        assert place.x1 <= box.x1
    blue = [mark.get_facecolor()[2] for mark in marks]
    assert blue[0] > blue[1]
    assert "relevance 0.26" in words(figure)


@pytest.mark.parametrize("relevance", [math.nan, 0.3])
def test_equal_or_unknown_relevance_needs_no_scale(relevance):
    tokens = tuple(dataclasses.replace(token, relevance=relevance, is_key=True) for token in spell(QUESTION))
    figure = pruning_trace(image_trace(tokens=tokens)).plot(COFFEE)
    draw(figure)
    assert "relevance" not in words(figure)


@pytest.mark.parametrize("pieces", [[], QUESTION], ids=["no instruction", "no key words"])
def test_the_caption_says_when_no_word_guided(pieces):
    figure = pruning_trace(image_trace(tokens=spell(pieces), reference="visual_cls")).plot(COFFEE)
    draw(figure)
    assert "decoder guided by the visual CLS" in words(figure)
    assert ("(no key words)" in words(figure)) == bool(pieces)
    assert "576 → 120 → 64 visual tokens" in words(figure)


@pytest.mark.slow
def test_panels_say_what_they_show(trace):
    text = words(trace.plot(COFFEE, title="A title"))
    for expected in (
        "A title",
        "as the model sees it",
        "after the vision tower",
        "after 6 decoder layers",
        "88",
        "wall",
    ):
        assert expected in text
    assert "after 3 vision layers" in words(trace.plot(COFFEE, stages=0))
    assert len(trace.plot(COFFEE, stages="decoder").axes) == 5
    assert len(pruning_trace(image_trace(tower=(1, 0), decoder=(1, 0))).plot(COFFEE).axes) == 1


def test_methods_are_drawn_side_by_side(trace):
    topk = dataclasses.replace(
        pruning_trace(image_trace(tower=(64, 4), decoder=(1, 0), tokens=(), reference=None, seed=4)),
        method="topk",
        decoder_layer_tokens=(64,) * 32,
        kv_bytes=11_000_000,
    )
    figure = topk.plot(COFFEE, beside=[trace])
    draw(figure)
    whole = pixels(figure.axes[0])
    for axes, kept in zip(figure.axes[1:], (topk, trace), strict=True):
        untouched = (pixels(axes) == whole).all(1)
        np.testing.assert_array_equal(untouched, np.isin(np.arange(576), kept.images[0].groups[-1].kept))
    text = words(figure)
    for expected in (
        "as the model sees it",
        "64 topk 64 ivtp",
        "How many clocks are on the wall ?",
        "averaged over the decoder's layers: topk 64.0, ivtp 76.2",
        "KV cache: topk 11 MB, ivtp 12.3 MB of 35.1 MB",
        "relevance 0.25",
    ):
        assert expected in text


def test_another_method_is_named_in_the_caption(trace):
    assert "fastv: 576 → 120 → 64 visual tokens" in words(dataclasses.replace(trace, method="fastv").plot(COFFEE))


def test_traces_that_do_not_belong_side_by_side_are_refused(trace):
    with pytest.raises(ValueError, match=r"beside: a trace of grid \(4, 4\); expected \(24, 24\)"):
        trace.plot(COFFEE, beside=[pruning_trace(image_trace((4, 4), (8, 1), (4, 1)))])
    with pytest.raises(ValueError, match="stages='all': only the end of every method is shown side by side"):
        trace.plot(COFFEE, beside=[trace], stages="all")
    with pytest.raises(ValueError, match="index=1: the trace holds 1 image"):
        pruning_trace(image_trace(), image_trace()).plot(COFFEE, 1, beside=[trace])


def test_size_scales_the_whole_figure(trace):
    natural, small = trace.plot(COFFEE), trace.plot(COFFEE, size=6)
    assert small.get_figwidth() == pytest.approx(6)
    ratio = natural.get_figheight() / natural.get_figwidth()
    assert small.get_figheight() / 6 == pytest.approx(ratio)
    assert draw(small).shape[:2] == (int(6 * ratio * 144), 864)


def test_notebooks_can_show_it_and_pickle_can_copy_it(trace):
    figure = trace.plot(COFFEE, stages=[], size=2)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert pickle.loads(pickle.dumps(figure))._repr_png_() == figure._repr_png_()


def test_rc_parameters_do_not_break_it(trace):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "font.family": "serif", "figure.autolayout": True}):
        draw(trace.plot(COFFEE, title="50% of $5"))


@pytest.mark.parametrize("index", [1, -1, "0"])
def test_an_index_out_of_range_is_named(trace, index):
    with pytest.raises(ValueError, match=f"index={index!r}: the trace holds 1 image"):
        trace.plot(COFFEE, index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": "towers"}, "stages='towers': expected 'all', 'tower', 'decoder' or places from 0 to 11"),
        ({"stages": [3, 12]}, r"stages=\[3, 12\] holds 12"),
        ({"size": -1}, "size=-1"),
        ({"size": (10, 4)}, r"size=\(10, 4\)"),
        ({"image": None}, "image of type NoneType"),
    ],
)
def test_what_cannot_be_drawn_is_named(trace, options, message):
    with pytest.raises(ValueError, match=message):
        trace.plot(**{"image": COFFEE, **options})


@pytest.mark.slow
def test_without_matplotlib_the_error_says_what_to_install(trace, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install ivtp-llava\[plot\]"):
        trace.plot(COFFEE)
