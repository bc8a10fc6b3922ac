"""The page of attention maps in a headless Chromium: it renders, reacts, and runs nothing but its own script."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layertap import Result
from layertap._pictures import page, ramp
from layertap._pictures.attention_maps import AttentionMaps
from layertap._pictures.labels import visible

from .pictures import HOSTILE, result_of

pytestmark = pytest.mark.long

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NAMES = ["[CLS]", "is", "it", "cold", "[SEP]", "it", "froze", "[SEP]"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(PROGRAMS)}")
    with playwright.sync_playwright() as driver:
        # A container's root user cannot have Chromium's sandbox.
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page of a result. In the end, nothing may have been reported, asked or requested."""
    opened: list[Any] = []
    trouble: list[str] = []

    def show(result: Result, texts: tuple[str, ...] = ("a text",), **options: Any) -> Any:
        num_layers, num_heads = result.attentions.shape[:2]
        maps = AttentionMaps.of(result, layers=range(num_layers), heads=range(num_heads), texts=texts)
        path = tmp_path / f"{len(opened)}.html"
        path.write_bytes(page.page(maps, page.Heading("a model", texts)))
        context = browser.new_context(viewport={"width": 1400, "height": 1000}, **options)
        shown = context.new_page()
        opened.append(context)
        # Only the tests read pixels back, of which Chromium says that it is slow.
        shown.on(
            "console",
            lambda message: (
                None if "willReadFrequently" in message.text else trouble.append(f"console: {message.text}")
            ),
        )
        shown.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        shown.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        shown.on(
            "request",
            lambda request: (
                None if request.url == path.as_uri() else trouble.append(f"request: {request.url}")
            ),
        )
        shown.goto(path.as_uri())
        return shown

    yield show
    for context in opened:
        context.close()
    assert trouble == []


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


def pixel(shown: Any, selector: str, x: int, y: int) -> tuple[int, ...]:
    """The colour of a canvas at a place."""
    script = "(c, [x, y]) => [...c.getContext('2d').getImageData(x, y, 1, 1).data]"
    *rgb, alpha = shown.locator(selector).evaluate(script, [x, y])
    assert alpha == 255
    return tuple(rgb)


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def cell(shown: Any, row: int, column: int) -> dict[str, float]:
    """Where the pointer must be to be over a cell of the large map."""
    size = shown.locator("#canvas").bounding_box()["width"] / len(NAMES)
    return {"x": (column + 0.5) * size, "y": (row + 0.5) * size}


def test_it_draws_the_maps(show: Any) -> None:
    result = result_of(NAMES, second=5)
    shown = show(result)
    assert shown.title() == "Attention: a text"
    assert not shown.locator("#scroll").evaluate("e => e.scrollWidth > e.clientWidth")
    assert shown.locator("#facts").text_content() == "a model · 8 tokens · 3 layers · 2 heads"
    assert shown.locator("#strip .token").all_text_contents() == NAMES
    for axis in ("#rows", "#columns"):
        assert shown.locator(f"{axis} .name").all_text_contents() == NAMES
    # At first, the mean of the last layer. Then any map that is chosen.
    expect(shown.locator("#map-title")).to_have_text("Layer 2, mean of 2 heads")
    for title, chosen in (
        ("Layer 2, mean of 2 heads", result.attentions[2].mean(0)),
        ("Layer 1, head 0", None),
    ):
        if chosen is None:
            shown.get_by_role("radio", name=title.replace("L", "l")).click()
            chosen = result.attentions[1, 0]
        expect(shown.locator("#map-title")).to_have_text(title)
        for row, column in ((0, 0), (3, 5), (7, 2)):
            expected = ramp.color(float(chosen[row, column] / chosen.max()))
            np.testing.assert_allclose(pixel(shown, "#canvas", column, row), expected, atol=3)
    # The small maps share a scale, and show the square root.
    small = shown.get_by_role("radio", name="layer 2, head 1").locator("canvas")
    small.evaluate("canvas => canvas.id = 'small'")
    expected = ramp.color(float(np.sqrt(result.attentions[2, 1, 3, 5])))
    np.testing.assert_allclose(pixel(shown, "#small", 5, 3), expected, atol=3)


def test_hovering_a_token_shows_where_it_looks(show: Any) -> None:
    result = result_of(NAMES)
    shown = show(result)
    shown.get_by_role("radio", name="layer 0, head 1").click()
    values = result.attentions[0, 1]
    shown.locator("#strip .token").nth(3).hover()
    expect(shown.locator("#detail-title")).to_have_text("“cold”")
    expect(shown.locator("#to-title")).to_have_text("“cold” looks at")
    expect(shown.locator("#from-title")).to_have_text("Who looks at “cold”")
    for name, weights in (("#to", values[3]), ("#from", values[:, 3])):
        shares = shown.locator(f"{name} .share").all_text_contents()
        assert shares == [percent(value) for value in sorted(weights.tolist(), reverse=True)[:7]]
    # A word that is there twice has its position.
    first = int(values[3].argmax())
    repeated = NAMES.count(NAMES[first]) > 1
    assert shown.locator("#to .word").first.text_content() == NAMES[first] + (f" {first}" if repeated else "")
    colour = ramp.color(1)
    assert (
        shown.locator("#strip .token").nth(first).evaluate("e => e.style.backgroundColor") == f"rgb{colour}"
    )
    assert shown.locator("#rows .active").text_content() == "cold"
    assert shown.locator("#columns .active").count() == 0
    # A column's name shows who looks at it.
    shown.locator("#columns .name").nth(6).hover()
    expect(shown.locator("#detail-title")).to_have_text("“froze”")
    expect(shown.locator("#strip-hint")).to_have_text("coloured by who looks at “froze”")
    expect(shown.locator("#column-mark")).to_be_visible()
    most = shown.locator("#strip .token").nth(int(values[:, 6].argmax()))
    assert most.evaluate("e => e.style.backgroundColor") == f"rgb{colour}"


def test_hovering_a_cell_shows_its_number(show: Any) -> None:
    result = result_of(NAMES)
    shown = show(result)
    shown.get_by_role("radio", name="layer 1, head 1").click()
    for row, column in ((3, 6), (6, 3), (0, 7)):
        shown.locator("#cells").hover(position=cell(shown, row, column))
        share = percent(float(result.attentions[1, 1, row, column]))
        expect(shown.locator("#detail-title")).to_have_text(f"“{NAMES[row]}” → “{NAMES[column]}”: {share}")
        expect(shown.locator("#cell-mark")).to_be_visible()
    shown.mouse.move(2, 2)
    expect(shown.locator("#detail-title")).to_have_text("")
    expect(shown.locator("#cell-mark")).to_be_hidden()


def test_a_click_keeps_a_token(show: Any) -> None:
    shown = show(result_of(NAMES))
    token = shown.locator("#strip .token").nth(2)
    token.click()
    shown.mouse.move(2, 2)
    expect(shown.locator("#detail-title")).to_have_text("“it”")
    expect(token).to_have_attribute("aria-pressed", "true")
    shown.keyboard.press("Escape")
    expect(shown.locator("#detail-title")).to_have_text("")
    expect(token).to_have_attribute("aria-pressed", "false")


def test_the_keyboard(show: Any) -> None:
    shown = show(result_of(NAMES))
    chosen = shown.get_by_role("radio", checked=True)
    chosen.focus()
    for key, name in (
        ("ArrowUp", "layer 1, mean of 2 heads"),
        ("ArrowLeft", "layer 1, head 1"),
        ("ArrowDown", "layer 2, head 1"),
        ("ArrowDown", "layer 2, head 1"),
    ):
        shown.keyboard.press(key)
        expect(shown.get_by_role("radio", checked=True)).to_have_attribute("aria-label", name)
        expect(shown.get_by_role("radio", checked=True)).to_be_focused()
    shown.locator("#strip .token").first.focus()
    shown.keyboard.press("ArrowRight")
    expect(shown.locator("#detail-title")).to_have_text("“is”")
    shown.keyboard.press("End")
    expect(shown.locator("#detail-title")).to_have_text("“[SEP]”")
    # One stop of the tab key for all tokens, and one for all maps.
    assert shown.locator("#strip .token[tabindex='0']").count() == 1
    assert shown.locator("#grid .small[tabindex='0']").count() == 1
    width = shown.locator("#canvas").bounding_box()["width"]
    shown.keyboard.press("-")
    assert shown.locator("#canvas").bounding_box()["width"] < width
    shown.keyboard.press("0")
    assert shown.locator("#canvas").bounding_box()["width"] == width


def test_everything_has_a_name(show: Any) -> None:
    shown = show(result_of(NAMES))
    nameless = shown.evaluate(
        """() => [...document.querySelectorAll('button, input, canvas[role], [role]')].filter((one) =>
            !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby') && !one.textContent.trim()
            && !one.labels?.length).map((one) => one.outerHTML)"""
    )
    assert nameless == []


def test_zoom_and_long_texts(show: Any) -> None:
    names = [f"word{position}" for position in range(150)]
    shown = show(result_of(names))
    width = shown.locator("#canvas").bounding_box()["width"]
    assert width <= shown.locator("#view").bounding_box()["width"]
    expect(shown.locator("#map-hint")).to_contain_text("Zoom in to see all labels.")
    expect(shown.locator("#rows .name").first).to_be_hidden()
    for _ in range(12):
        shown.get_by_role("button", name="Zoom in").click()
    expect(shown.locator("#rows .name").first).to_be_visible()
    assert shown.locator("#canvas").bounding_box()["width"] > 2 * width
    box = shown.locator("#scroll")
    assert box.evaluate("e => e.scrollWidth > e.clientWidth && e.scrollHeight > e.clientHeight")
    # The names stay in view.
    box.evaluate("e => { e.scrollLeft = 600; e.scrollTop = 600; }")
    edge = box.bounding_box()
    assert shown.locator("#rows").bounding_box()["x"] == pytest.approx(edge["x"], abs=1)
    assert shown.locator("#columns").bounding_box()["y"] == pytest.approx(edge["y"], abs=1)
    shown.get_by_role("button", name="fit").click()
    assert shown.locator("#canvas").bounding_box()["width"] == width


def test_without_special_tokens(show: Any) -> None:
    result = result_of(NAMES)
    shown = show(result)
    shown.get_by_label("without special tokens").check()
    kept = [position for position, name in enumerate(NAMES) if name[0] != "["]
    assert shown.locator("#rows .name").all_text_contents() == [NAMES[position] for position in kept]
    assert shown.locator("#canvas").evaluate("canvas => canvas.width") == len(kept)
    values = result.attentions[2].mean(0)[np.ix_(kept, kept)]
    np.testing.assert_allclose(pixel(shown, "#canvas", 4, 1), ramp.color(values[1, 4] / values.max()), atol=3)
    shown.get_by_label("lift small values").check()
    lifted = ramp.color(float(np.sqrt(values[1, 4] / values.max())))
    np.testing.assert_allclose(pixel(shown, "#canvas", 4, 1), lifted, atol=3)
    shown.locator("#cells").hover(position={"x": 3, "y": 3})
    expect(shown.locator("#detail-title")).to_contain_text(f"“is” → “is”: {percent(float(values[0, 0]))}")


def test_pairs_and_special_tokens_are_marked(show: Any) -> None:
    shown = show(result_of(NAMES, second=5), texts=("Is it cold?", "It froze."))

    def kinds(selector: str) -> list[str]:
        classes = shown.locator(selector).evaluate_all("all => all.map((one) => one.className)")
        return [re.sub(r"token|name|quiet|active", "", one).strip() for one in classes]

    expected = ["special", "first", "first", "first", "special", "second", "second", "special"]
    assert kinds("#strip .token") == kinds("#rows .name") == kinds("#columns .name") == expected
    shown.locator("#strip .token").nth(6).hover()
    expect(shown.locator("#detail-facts")).to_have_text("position 6 · id 106 · second text")


def test_any_text_is_shown_as_text(show: Any) -> None:
    names = ["[CLS]", *HOSTILE, "[SEP]"]
    shown = show(result_of(names), texts=(" ".join(HOSTILE), "<b>bold</b>"))
    labels = shown.locator("#strip .token").all_text_contents()
    assert labels[0] == "[CLS]"
    assert labels[1:-3] == [visible(text) for text in HOSTILE[:-2]]
    assert labels[-3:-1] == ["∅", "␣"]
    assert shown.title().startswith("Attention: </script><script>document.title='run'")
    assert shown.locator("script").count() == 2
    assert shown.locator("b, img").count() == 0
    for position in range(len(names)):
        shown.locator("#strip .token").nth(position).hover()
        expect(shown.locator("#detail-title")).to_have_text(f"“{labels[position]}”", use_inner_text=False)


def test_dark_mode(show: Any) -> None:
    result = result_of(NAMES)
    shown = show(result, color_scheme="dark")
    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background))) < 40
    values = result.attentions[2].mean(0)
    expected = ramp.color(float(values[3, 5] / values.max()), ramp.DARK)
    np.testing.assert_allclose(pixel(shown, "#canvas", 5, 3), expected, atol=3)
    shown.emulate_media(color_scheme="light")
    shown.wait_for_function("getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'")
    expected = ramp.color(float(values[3, 5] / values.max()))
    np.testing.assert_allclose(pixel(shown, "#canvas", 5, 3), expected, atol=3)


def test_one_map_and_one_token(show: Any) -> None:
    shown = show(result_of(["alone"], num_layers=1, num_heads=1))
    expect(shown.locator("#overview")).to_be_hidden()
    expect(shown.locator("#map-title")).to_have_text("Layer 0, head 0")
    shown.locator("#cells").hover()
    expect(shown.locator("#detail-title")).to_have_text("“alone” → “alone”: 100.00 %")


def test_8_bits(show: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_FINE_VALUES", 0)
    result = result_of(NAMES)
    shown = show(result)
    expect(shown.locator("#precision")).to_contain_text("8 bits")
    shown.get_by_role("radio", name="layer 1, head 1").click()
    shown.locator("#cells").hover(position=cell(shown, 3, 6))
    expect(shown.locator("#detail-title")).to_contain_text(" %")
    share = float(shown.locator("#detail-title").text_content().split(": ")[1].split()[0])
    assert share == pytest.approx(100 * float(result.attentions[1, 1, 3, 6]), abs=0.45)


def test_a_narrow_screen(show: Any) -> None:
    shown = show(result_of(NAMES))
    shown.set_viewport_size({"width": 380, "height": 700})
    shown.wait_for_function("document.documentElement.scrollWidth <= 380")
