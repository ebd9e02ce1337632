"""The page in a real browser: headless Chromium, offline.  Skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.folders import write_folder
from tropd.report.page import render
from tropd.report.runs import read_runs
from tropd.report.transcripts import collect

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium")

EVIL = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    low, high = [[0.0, 0.0]] * 9 + [[1.0, 1.0]], [[1.0, 0.0]] * 10
    texts = [" the cat sat", " a dog ran", EVIL]
    runs = [
        write_folder(folder / name, steps=8, before=low, after=high, saved=[0, 7], texts=texts, seed=seed)
        for seed, name in enumerate(("first", "second"))
    ]
    page = folder / "report.html"
    page.write_text(render(found := read_runs(runs), collect(found)))
    return page


@pytest.fixture
def page(browser: playwright.Browser, report: Path) -> Iterator[playwright.Page]:
    """The report, open in a fresh offline profile; leaving it checks that nothing went wrong on the way."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else wrong.append(asked.url))
    page.goto(report.as_uri())
    page.wait_for_selector("#found:not(:empty)")
    yield page
    context.close()
    assert wrong == []


def test_every_chart_is_drawn_when_it_is_reached(page: playwright.Page) -> None:
    charts = page.locator("figure.chart")
    assert charts.count() > 10
    for chart in charts.all():
        chart.scroll_into_view_if_needed()
        chart.locator("svg.main-svg").first.wait_for()


def test_text_of_a_run_stays_text(page: playwright.Page) -> None:
    page.fill("#filters [name=text]", "onerror")
    page.locator("#list [role=option]").first.click()
    assert "onerror" in page.locator("#answer").inner_text()
    assert page.title() != "owned" and page.locator("#answer img").count() == 0


def test_transcripts_are_found_by_their_text(page: playwright.Page) -> None:
    every = page.locator("#found").inner_text()
    page.fill("#filters [name=text]", "dog")
    page.wait_for_function("before => document.getElementById('found').textContent !== before", arg=every)
    shown = page.locator("#list [role=option]").all_inner_texts()
    assert shown and all("dog" in text for text in shown)
    page.click("#filters [type=reset]")
    page.wait_for_function("before => document.getElementById('found').textContent === before", arg=every)


def test_arrow_keys_go_from_token_to_token_and_say_what_both_models_thought(page: playwright.Page) -> None:
    page.locator("#list [role=option]").first.click()
    page.locator("#answer [tabindex='0']").focus()
    said = []
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        card = page.locator("#card")
        card.wait_for(state="visible")
        said.append(card.inner_text())
    assert len(set(said)) == 3 and all("student" in text.lower() and "teacher" in text.lower() for text in said)
    page.keyboard.press("Escape")
    page.locator("#card").wait_for(state="hidden")


def test_everything_has_a_name_for_a_screen_reader(page: playwright.Page) -> None:
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, select, input, [role=listbox], [role=group], figure, section')]
        .filter(e => !(e.textContent.trim() && e.matches('button')) && !e.labels?.length
            && !e.getAttribute('aria-label') && !document.getElementById(e.getAttribute('aria-labelledby')))
        .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []


def test_light_and_dark_are_both_readable_and_a_phone_needs_no_sideways_scrolling(
    browser: playwright.Browser, report: Path
) -> None:
    for scheme in ("light", "dark"):
        with browser.new_context(color_scheme=scheme, viewport={"width": 390, "height": 844}, offline=True) as context:
            page = context.new_page()
            page.goto(report.as_uri())
            wide, contrast = page.evaluate(CONTRAST)
            assert wide <= 390 and contrast >= 4.5, f"{scheme}: {wide} px wide, contrast {contrast:.1f}"


CONTRAST = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = light(getComputedStyle(document.body).backgroundColor);
  const words = [...document.querySelectorAll('p, h1, h2, h3, td, th, label')].filter((e) => e.offsetParent);
  const contrasts = words.map((e) => light(getComputedStyle(e).color))
    .map((ink) => (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05));
  return [document.documentElement.scrollWidth, Math.min(...contrasts)];
}"""
