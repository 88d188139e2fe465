"""The demonstration: what it says, and how it behaves in a real browser, on a desk and on a phone."""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from benchmarks.quality.world import draw_scene

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"
SHOTS = ROOT / "out" / "space"
"""Screenshots stay there to be looked at."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def space() -> Iterator[Any]:
    sys.path.insert(0, str(SPACE))
    import app

    yield SimpleNamespace(app=app, demo=app.Demo(str(app.MINIATURE)))
    sys.path.remove(str(SPACE))
    del sys.modules["app"]


@pytest.fixture(scope="module")
def address(space: Any) -> Iterator[str]:
    page = space.app.build(space.demo)
    _, url, _ = page.launch(
        theme=gr.themes.Default(), css=space.app.CSS, prevent_thread_lock=True, quiet=True, share=False, inbrowser=False
    )
    yield url
    page.close()


def ask(space: Any, question: str, budget: float, scene: int = 113) -> tuple[str, str, str]:
    return space.demo.ask(Image.fromarray(draw_scene("test", scene, side=336).pixels), question, budget)


@pytest.mark.slow
def test_both_answers_their_cost_the_words_and_the_stages(space: Any) -> None:
    answers, words, stages = ask(space, "Which colour is the tile behind the scooter?", 64)
    assert re.findall("<p>(.*?)</p>", answers) == ["yellow", "yellow"]
    cards = [re.findall("<dd>(.*?)</dd>", card) for card in answers.split("<h3>")[1:]]
    assert [card[:2] for card in cards] == [["576", "576"], ["64", "86"]]
    unpruned, pruned = (float(card[2].removesuffix(" MB")) for card in cards)
    assert pruned < unpruned / 4
    assert re.findall("<mark.*?>(.*?)</mark>", words) == ["scooter"]
    assert re.findall("<b>(.*?)</b>", stages) == ["576", "389", "263", "178", "120", "103", "88", "75", "64"]
    assert space.demo.model.pruning_config.visual_tokens == 64


@pytest.mark.slow
def test_the_page_sends_no_reports(space: Any) -> None:
    assert not space.app.build(space.demo).analytics_enabled


@pytest.mark.slow
def test_the_budget_is_that_of_the_slider(space: Any) -> None:
    for budget in (8, 16.0, 512):
        stages = ask(space, "Do you see a scooter here?", budget)[2]
        assert re.findall("<b>(.*?)</b>", stages)[-1] == str(int(budget))


@pytest.mark.slow
def test_what_people_write_is_text(space: Any) -> None:
    answers, words, _ = ask(space, "<script>alert(1)</script> Is there a drum?", 64)
    assert "<script>" not in answers + words
    assert "&lt;script&gt;" in words
    assert "No word of it is visible" in ask(space, "Well?", 64)[1]


@pytest.mark.parametrize(
    ("image", "question", "said"),
    [
        (None, "What is this?", "Choose or upload an image"),
        (Image.new("RGB", (8, 8)), "  ", "Ask a question"),
        (Image.new("RGB", (8, 8)), "<image> what?", "leave it out"),
    ],
)
def test_nothing_to_ask(space: Any, image: Any, question: str, said: str) -> None:
    with pytest.raises(gr.Error, match=said):
        space.demo.ask(image, question, 64)


@pytest.mark.slow
def test_pictures_of_every_kind(space: Any) -> None:
    for mode in ("L", "RGBA", "P"):
        assert "576" in space.demo.ask(Image.new(mode, (90, 50)), "What is this?", 32)[2]


@pytest.mark.parametrize(
    ("pruning", "shown"),
    [
        ({"visual_tokens": 4}, (8, 512, 8)),
        ({"visual_tokens": 600}, (8, 512, 512)),
        ({"visual_tokens": "auto", "min_visual_tokens": 24}, (24, 512, 64)),
    ],
)
def test_the_slider_holds_only_budgets_that_can_be_asked_for(space: Any, pruning: Any, shown: Any) -> None:
    """What opens the page asks at the checkpoint's own budget."""
    with space.demo.model.pruning(**pruning):
        page = space.app.build(space.demo)
    (slider,) = (block for block in page.blocks.values() if isinstance(block, gr.Slider))
    assert (slider.minimum, slider.maximum, slider.value) == shown
    assert slider.preprocess(slider.value) == shown[2]


@pytest.mark.parametrize("name", [None, ""])
def test_a_space_without_a_checkpoint_says_so(
    space: Any, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space.app, "MINIATURE", tmp_path / "miniature")  # as on the Hub
    if name is None:
        monkeypatch.delenv("MODEL_ID", raising=False)
    else:
        monkeypatch.setenv("MODEL_ID", name)
    with pytest.raises(SystemExit, match="MODEL_ID: not set"):
        space.app.main()


def test_every_example_is_there_with_its_licence(space: Any) -> None:
    for one in space.app.EXAMPLES:
        assert Image.open(SPACE / one["image"]).size == (336, 336)
    assert "Apache-2.0" in (SPACE / "README.md").read_text()


@pytest.mark.slow
def test_the_versions_are_those_of_the_project() -> None:
    wanted = (ROOT / "pyproject.toml").read_text()
    for line in (SPACE / "requirements.txt").read_text().splitlines():
        assert f'"{line}"' in wanted, line
    for line in (ROOT / "hub_cards" / "requirements.txt").read_text().splitlines():
        assert f'"{line}"' in wanted, line


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; this machine has none (Debian: apt install chromium)")
@pytest.mark.parametrize(("name", "width", "height"), [("desk", 1200, 900), ("phone", 390, 844)])
def test_in_a_browser(address: str, tmp_path: Path, name: str, width: int, height: int) -> None:
    """Upload a picture, ask, slide the budget, and see the picture change."""
    from playwright.sync_api import expect, sync_playwright

    SHOTS.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_scene("test", 7, side=336).pixels).save(tmp_path / "mine.png")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        # The first example is asked when the page opens.
        expect(page.locator("#stages figure")).to_have_count(9, timeout=120_000)

        page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
        page.locator("input[type=file]").first.set_input_files(tmp_path / "mine.png")
        page.locator("#question textarea").fill("What stands to the left of the bus?")
        page.locator("#ask").click()
        expect(page.locator("#words")).to_contain_text("bus", timeout=60_000)
        expect(page.locator(".answer p").first).to_have_text("pencil", timeout=60_000)
        page.screenshot(path=SHOTS / f"{name}-64.png", full_page=True)
        last = page.locator("#stages figure").last
        before = last.locator("img").get_attribute("src")
        expect(last.locator("b")).to_have_text("64")

        slider = page.locator("#budget input[type=range]")
        slider.focus()
        for _ in range(6):
            slider.press("ArrowLeft")
        box = slider.bounding_box()
        assert box is not None
        page.mouse.click(box["x"] + 0.02 * box["width"], box["y"] + box["height"] / 2)
        expect(last.locator("b")).not_to_have_text("64", timeout=60_000)
        kept = int(last.locator("b").inner_text())
        assert 8 <= kept < 64
        assert last.locator("img").get_attribute("src") != before
        page.screenshot(path=SHOTS / f"{name}-{kept}.png", full_page=True)
        # Nothing sticks out sideways, and both answers stand side by side.
        assert page.evaluate("document.documentElement.scrollWidth") == width
        left, right = (page.locator(".answer").nth(number).bounding_box() for number in (0, 1))
        assert left is not None
        assert right is not None
        assert left["y"] == right["y"]
        assert right["x"] >= left["x"] + left["width"]
        assert not complaints
        browser.close()
