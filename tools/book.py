"""Make a site of the lessons as they are committed, and of the pages beside them: `python -m tools.book` (make book).

Nothing is executed. Sphinx reads a copy, so that the lessons stay where the README and its readers look for them.
"""

import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

from helpers.files import PROJECT, shown

BOOK = PROJECT / ".book"
TAKEN = ("README.md", "LICENSE", "notes", "docs", "res", "helpers", "build")  # with what pages link to
CONTENTS = """
```{toctree}
:hidden:
:caption: Lessons
:glob:
notes/*
```
```{toctree}
:hidden:
:caption: Pages
docs/articles
docs/own_data
docs/results
docs/speed
docs/figures
docs/answers
docs/glossary
docs/since_2019
build/README
```
"""
OPTIONS = {
    "project": "RecNN", "html_title": "RecNN", "html_theme": "furo", "html_show_sourcelink": False,
    "extensions": ["myst_nb", "sphinx_copybutton", "sphinx-mathjax-offline"], "nb_execution_mode": "off",
    "nb_merge_streams": True, "myst_enable_extensions": ["dollarmath", "deflist"], "myst_heading_anchors": 3,
    "include_patterns": ["index.md", "notes/*.ipynb", "docs/*.md", "docs/*.ipynb", "build/README.md"],
    "suppress_warnings": ["mystnb.unknown_mime_type"],  # of progress bars
}


def make(place: Path = BOOK) -> int:
    """Write the site to `place`/html; return 0, or 1 where Sphinx warns of a link or a figure that is missing."""
    source = place / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for name in TAKEN:
        if (PROJECT / name).is_dir():
            shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("model", "__pycache__"))
        else:
            shutil.copy2(PROJECT / name, source / name)
    for page in (*source.glob("notes/*.ipynb"), *source.glob("docs/*")):
        page.write_text(page.read_text(encoding="utf-8").replace("../README.md", "../index.md"), encoding="utf-8")
    with (source / "README.md").rename(source / "index.md").open("a", encoding="utf-8") as first:
        first.write(CONTENTS)
    site = Sphinx(source, None, place / "html", place / "trees", "html", OPTIONS, status=None, warningiserror=True)
    site.build()
    return site.statuscode


if __name__ == "__main__":
    code = make()
    print(f"open {shown(BOOK / 'html' / 'index.html')} in a browser" if not code else "the book has faults, see above")
    sys.exit(code)
