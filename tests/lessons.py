"""Reach the `lesson` cells of a notebook, so that what is tested is what is read."""

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import nbformat

NOTES = Path(__file__).resolve().parent.parent / "notes"


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
            exec(compile(cell.source, f"{name}: {cell.id}", "exec"), space)
    return SimpleNamespace(**space)


def load_function(name: str, function: str) -> Callable:
    """Return one function of a notebook that is not a lesson cell, by its name."""
    cells = [cell for cell in nbformat.read(NOTES / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"]
    tree = next(node for cell in cells for node in ast.parse(cell.source).body
                if isinstance(node, ast.FunctionDef) and node.name == function)
    space = vars(load_lesson(name)).copy()
    exec(compile(ast.Module([tree], type_ignores=[]), f"{name}: {function}", "exec"), space)
    return space[function]
