from contextlib import closing

import nbformat
import pytest

from helpers.files import PROJECT
from tools import book
from tools.lessons import LESSONS


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    place = tmp_path_factory.mktemp("book")
    assert book.make(place) == 0  # Sphinx warned of nothing: all links between pages, and all images, are there
    return place / "html"


def test_every_lesson_and_page_is_in_the_book(site):
    first = (site / "index.html").read_text(encoding="utf-8")
    for page in (*(f"notes/{name}.html" for name in LESSONS),
                 *(f"docs/{path.stem}.html" for path in (PROJECT / "docs").glob("*.md"))):
        assert (site / page).exists() and f'href="{page}"' in first


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_ends_with_the_way_to_its_neighbours(name):
    names = list(LESSONS)
    place = names.index(name)
    last = nbformat.read(PROJECT / "notes" / f"{name}.ipynb", as_version=4).cells[-1].source
    for other in names[max(place - 1, 0):place] + names[place + 1:place + 2]:
        assert f"({other}.ipynb)" in last


WIDE, PHONE = 1280, 390


@pytest.mark.parametrize(("page", "width"), [("index", WIDE), ("index", PHONE), ("notes/05_ddpg", WIDE), (
    "docs/answers", PHONE), *((f"notes/{name}", PHONE) for name in LESSONS)])
def test_a_page_in_a_browser_has_its_equations_and_images_and_fits(site, browser, page, width):
    with closing(browser.new_page(viewport={"width": width, "height": 800})) as shown:
        shown.goto((site / f"{page}.html").as_uri())
        written = shown.locator(".math").count()
        if written:  # all are drawn, without a network
            shown.wait_for_function("n => document.querySelectorAll('.math mjx-container').length >= n", arg=written)
        assert written or not page.startswith("notes/05")
        assert shown.evaluate("[...document.images].every(image => image.complete && image.naturalWidth)")
        assert shown.evaluate("document.documentElement.scrollWidth") <= width


def test_the_search_finds_the_lesson_of_a_word(site, browser):
    with closing(browser.new_page()) as shown:
        shown.goto((site / "search.html").as_uri() + "?q=Wolpertinger")
        shown.wait_for_selector("#search-results li a[href*='notes/05b_serving.html']")
