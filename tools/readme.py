"""Put measured tables where the README shows them."""

import re

from helpers.files import PROJECT, replacing


def block(name: str, text: str) -> str:
    """Return text between the README's marks of that name."""
    return f"<!-- {name} -->\n{text}\n<!-- /{name} -->"


def replace_block(name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in the README."""
    path = PROJECT / "README.md"
    pattern = f"<!-- {name} -->.*<!-- /{name} -->"
    with replacing(path) as beside:
        beside.write_text(re.sub(pattern, lambda _: block(name, text), path.read_text(encoding="utf-8"), flags=re.S),
                          encoding="utf-8")
