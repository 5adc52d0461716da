"""All lessons, short, on tables as people have them, and then a slate in the browser. `make test` runs it by itself."""

import json
import os
import subprocess
import sys

import nbformat
import pytest

from benchmarks.service import free_port, service
from helpers import files
from tests import tables
from tests.test_page import rate, rows, settled, slate, visit
from tools import run as series

pytestmark = pytest.mark.skipif(not os.environ.get("RECNN_TABLES"), reason="minutes: make check-tables")


FIRST = next(iter(tables.TABLES))
OF_A_TABLE = [name for name, lesson in series.LESSONS.items() if lesson.reads or lesson.writes == ("infos.json",)]


@pytest.fixture(scope="module", params=tables.TABLES)
def shipped(request, tmp_path_factory):
    """Return (what the run said, its home, the folder to ship) of one table; what no table changes is run once."""
    root = tmp_path_factory.mktemp("any")
    folder = root / request.param
    folder.mkdir()
    tables.TABLES[request.param](folder)
    only = () if request.param == FIRST else OF_A_TABLE
    run = subprocess.run([sys.executable, "-m", "tools.run", "--quick", "--dataset", str(folder), *only],
                         env={**os.environ, "RECNN_ROOT": str(root)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout, files.data_dir(str(folder), root), files.build_dir(str(folder), root)


def test_every_lesson_runs_and_the_run_ends_with_its_table(shipped):
    said, home, _ = shipped
    ran = list(series.LESSONS) if home.name == FIRST else OF_A_TABLE
    assert [line.split()[0] for line in said.splitlines() if line[:2].isdecimal()] == ran
    assert "make serve" in said and "QUICK" in said
    for name in ran:
        outputs = [output for cell in nbformat.read(home / "notes" / f"{name}.ipynb", as_version=4).cells
                   if cell.cell_type == "code" for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"]


def test_what_is_assumed_of_a_table_is_said_first(shipped):
    said, home, _ = shipped
    first = said.partition("\nnotebook")[0]
    assert ("every row is a click" in first) == (home.name == "clicks")
    assert ("order of time" in first and "items' ids are words" in first) == (home.name == "shop")


def test_a_slate_in_the_browser_follows_a_rating(shipped, browser):
    said, home, folder = shipped
    items = json.loads((folder / "model" / "items.json").read_text(encoding="utf-8"))
    assert {type(item["id"]) for item in items} == {int if home.name == "clicks" else str}
    port = free_port()
    with service(folder / "model", port), visit(browser, f"http://127.0.0.1:{port}") as page:
        before = slate(page)
        rate(page, items[20]["title"].partition(" (")[0], "5")
        after, place = settled(page)
        assert place and len(after) == 10 and after != before and len(rows(page)) == 1
        assert set(after) <= {str(item["id"]) for item in items}
        warned = page.locator("#warning").is_visible()
    warning = json.loads((folder / "model" / "manifest.json").read_text(encoding="utf-8"))["warning"]
    assert warned == (warning is not None) == ("ranked no better" in said)
