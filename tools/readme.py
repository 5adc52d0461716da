"""Put measured tables where the README, or a page beside it, shows them."""

import re
from pathlib import Path

from helpers.files import PROJECT, replacing

PAGES = (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))


def block(name: str, text: str) -> str:
    """Return text between a page's marks of that name."""
    return f"<!-- {name} -->\n{text}\n<!-- /{name} -->"


def page_of(name: str) -> Path:
    """Return the page that has a block of that name."""
    return next(page for page in PAGES if f"<!-- {name} -->" in page.read_text(encoding="utf-8"))


def replace_block(name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` on the page that has it."""
    path = page_of(name)
    pattern = f"<!-- {name} -->.*<!-- /{name} -->"
    with replacing(path) as beside:
        beside.write_text(re.sub(pattern, lambda _: block(name, text), path.read_text(encoding="utf-8"), flags=re.S),
                          encoding="utf-8")
