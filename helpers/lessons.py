"""Reach the `lesson` cells of a notebook: what one teaches, another can use, and what is tested is what is read."""

import ast
import contextlib
from functools import cache
from types import SimpleNamespace

import nbformat

from helpers.files import PROJECT

NOTES = PROJECT / "notes"


@cache
def load_lesson(name: str) -> SimpleNamespace:
    """Return what the `lesson` cells of notes/<name>.ipynb define, run after the notebook's imports alone."""
    cells = [cell for cell in nbformat.read(NOTES / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"]
    imports = [node for cell in cells for node in ast.parse(cell.source).body
               if isinstance(node, ast.Import | ast.ImportFrom)]
    space: dict = {}
    exec(compile(ast.Module(imports, type_ignores=[]), f"{name}: imports", "exec"), space)
    for cell in cells:
        if "lesson" in cell.metadata.get("tags", []):
            with contextlib.redirect_stdout(None):  # a lesson may show a source beside its own
                exec(compile(cell.source, f"{name}: {cell.id}", "exec"), space)
    return SimpleNamespace(**space)
