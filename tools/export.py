"""Write helpers/agents/ from the `lesson` cells of the notebooks: `make agents`, and at the start of `make run`."""

import ast
import sys
from pathlib import Path

import nbformat

from helpers.files import PROJECT, replacing

NOTES, AGENTS = PROJECT / "notes", PROJECT / "helpers" / "agents"


def module_of(path: Path) -> str | None:
    """Return what a notebook's `lesson` cells define, with the imports that it uses, as a module; None without any."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    kept = []
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        if "lesson" in tags:
            lines = cell.source.splitlines()
            for node in ast.parse(cell.source).body:
                constant = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) \
                    and "parameters" not in tags
                if not constant and not isinstance(node, ast.FunctionDef | ast.ClassDef):
                    lines[node.lineno - 1:node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
            kept.append("\n".join(lines).strip())
    body = "\n\n\n".join(source for source in kept if source)
    if not body:
        return None
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    groups: list[list[str]] = [[], [], []]  # of Python, of others, of helpers
    for node in (node for cell in cells for node in ast.parse(cell.source).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            root = ast.unparse(node).split()[1].split(".")[0]
            group = groups[0 if root in sys.stdlib_module_names else 2 if root == "helpers" else 1]
            node.names = [alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) in used]
            line = ast.unparse(node) if node.names else ""
            if len(line) > 120:  # as ruff wraps it
                line = line.replace(" import ", " import (\n    ").replace(", ", ",\n    ") + ",\n)"
            if line and line not in group:
                group.append(line)
    imports = "\n\n".join("\n".join(sorted(group, key=lambda line: (line.startswith("from"), line.split()[1])))
                          for group in groups if group)
    about = f'"""What the lesson cells of notes/{path.name} define; `make agents` writes it."""'
    return f"{about}\n\n{imports}\n\n\n{body}\n"


def write(notes: Path = NOTES, agents: Path = AGENTS) -> None:
    """Write the module of every notebook that has lesson cells, where it has changed."""
    for path in sorted(notes.glob("*.ipynb")):
        place, source = agents / f"{path.stem.partition('_')[2]}.py", module_of(path)
        if source and not (place.exists() and place.read_text(encoding="utf-8") == source):
            with replacing(place) as beside:
                beside.write_text(source, encoding="utf-8")


if __name__ == "__main__":
    write()
