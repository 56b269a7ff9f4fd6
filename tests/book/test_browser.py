"""The built site in a browser: it asks no other host, and every page works on a laptop and on a phone."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from project import ROOT

pytestmark = pytest.mark.browser

LAPTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))
CHAPTERS = [chapter for part in TOC["parts"] for chapter in part["chapters"]]
PAGES = [
    TOC["root"],
    *(page["file"] for chapter in CHAPTERS for page in (chapter, *chapter.get("sections", ()))),
]


@dataclass
class Visit:
    """One opened page and what it said and asked for since."""

    page: Any
    elsewhere: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module", params=PAGES)
def visit(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Visit]:
    """Open one page of the site and let it finish."""
    context = browser.new_context(viewport=LAPTOP, color_scheme="light")
    visit = Visit(context.new_page())

    def route(route: Any) -> None:
        if route.request.url.startswith(address):
            route.continue_()
        else:
            visit.elsewhere.append(route.request.url)
            route.abort()

    context.route(lambda url: urlsplit(url).scheme in ("http", "https", "ws", "wss"), route)
    visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    visit.page.on(
        "console",
        lambda message: visit.complaints.append(message.text) if message.type == "error" else None,
    )
    visit.page.on(
        "response",
        lambda answer: (
            visit.complaints.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None
        ),
    )
    visit.page.goto(f"{address}/{request.param}.html", wait_until="load")
    visit.page.evaluate("window.MathJax ? MathJax.startup.promise.then(() => true) : true")
    if visit.page.locator('script[type="application/vnd.jupyter.widget-view+json"]').count():
        visit.page.wait_for_selector(".jupyter-widgets", state="attached")
    visit.page.wait_for_load_state("networkidle")
    yield visit
    context.close()


def test_page_works_without_an_error(visit: Visit) -> None:
    assert not visit.complaints


def test_every_formula_is_typeset(visit: Visit) -> None:
    page = visit.page
    formulas = page.locator("span.math, div.math").count()
    assert page.locator("mjx-container").count() >= formulas
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    # A formula inside raw HTML or a table that no script has found would still show its delimiters.
    assert not re.findall(r"\\\(|\\\[", page.locator("article").inner_text())


def test_every_slider_moves_its_picture(visit: Visit) -> None:
    page = visit.page
    for slider in page.locator(".widget-slider .noUi-handle").all():
        box = slider.locator("xpath=ancestor::*[contains(@class, 'widget-vbox')][1]")
        shown = box.locator("img:visible")
        before = shown.first.get_attribute("src")
        assert before
        slider.scroll_into_view_if_needed()
        slider.focus()
        at_end = slider.get_attribute("aria-valuenow") == slider.get_attribute("aria-valuemax")
        page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
        page.wait_for_function(
            "([box, src]) => ![...box.querySelectorAll('img')].some(i => i.offsetParent && i.src === src)",
            arg=[box.element_handle(), before],
        )
        assert shown.count() == 1


def test_every_picture_has_words(visit: Visit) -> None:
    pictures = visit.page.locator("article img").all()
    silent = [picture.get_attribute("src") for picture in pictures if not alternative(picture)]
    assert not silent


def alternative(picture: Any) -> str:
    """Return the words that stand for a picture, unless they are its file name, which says nothing."""
    names = (picture.get_attribute(name) for name in ("alt", "aria-label", "title"))
    words = next(filter(None, names), "")
    return "" if re.search(r"\.(png|svg|jpe?g)$|^[0-9a-f]{32,}", words) else words.strip()


def test_page_fits_a_phone(visit: Visit) -> None:
    visit.page.set_viewport_size(PHONE)
    try:
        wide = visit.page.evaluate(WIDER_THAN_SCREEN)
        assert not wide
    finally:
        visit.page.set_viewport_size(LAPTOP)


WIDER_THAN_SCREEN = """() => {
  const screen = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= screen) return [];
  const scrolls = e => e && (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
  return [...document.querySelectorAll("article *")]
    .filter(e => e.getBoundingClientRect().right > screen + 1 && !scrolls(e.parentElement))
    .slice(0, 5).map(e => e.outerHTML.slice(0, 120)).concat(`${document.documentElement.scrollWidth} px`);
}"""

# Words whose colour is too near to that of the paper behind them, by WCAG's contrast ratio. 4.5 is its
# bound for running text. Code is left out: its colours come from a theme made for that bound.
PALE_WORDS = """() => {
  const numbers = colour => colour.match(/[0-9.]+/g).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const weights = [0.2126, 0.7152, 0.0722];
  const luminance = colour => weights.reduce((sum, weight, i) => sum + weight * linear(colour[i] / 255), 0);
  const paper = e => {
    for (; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.5) return colour;
    }
    return [255, 255, 255];
  };
  const words = "p, li, td, th, .caption-text, h1, h2, h3, .geomlib-claim, .widget-label, .widget-readout";
  return [...document.querySelectorAll(words)].filter(e => {
    if (!e.closest("article") || !e.offsetParent || !e.textContent.trim()) return false;
    const [ink, behind] = [numbers(getComputedStyle(e).color), paper(e)].map(luminance);
    return (Math.max(ink, behind) + 0.05) / (Math.min(ink, behind) + 0.05) < 4.5;
  }).map(e => `${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 60)}`);
}"""


def test_words_stand_out_from_the_paper_in_both_modes(visit: Visit) -> None:
    page = visit.page
    assert not page.evaluate(PALE_WORDS)
    button = page.locator("button.theme-switch-button:visible").first
    for _ in range(3):
        if page.evaluate("document.documentElement.dataset.theme") == "dark":
            break
        button.click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.wait_for_timeout(300)  # the theme fades from one colour to the other
    assert not page.evaluate(PALE_WORDS)


def test_page_has_asked_no_other_host(visit: Visit) -> None:
    assert not visit.elsewhere
