"""What a reader would stumble over in a notebook, whatever its code does."""

import ast
import json
import re

import nbformat
import pytest
from bs4 import BeautifulSoup

from helpers.files import PROJECT
from tools.export import AGENTS, NOTES, module_of
from tools.lessons import LESSONS

PATHS = sorted(NOTES.glob("*.ipynb"))
HEADINGS = ("**Goal", "**You will learn", "## Setup", "## What can go wrong", "## References")


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    book = nbformat.read(request.param, as_version=4)
    book.metadata["name"] = request.param.stem
    return book


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def test_every_notebook_is_a_lesson_of_the_series_and_the_other_way_round():
    assert [path.stem for path in PATHS] == list(LESSONS)


def test_is_valid_small_and_was_run_top_to_bottom_in_a_fresh_kernel(notebook):
    notebook.metadata.pop("name")
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    text = nbformat.writes(notebook)
    assert len(text) < 1_500_000
    assert not re.search(r"/(work|root|home|tmp|Users)/", text) and not re.search(r"api_key\s*=\s*['\"]\w", text)


def test_opens_with_number_citation_and_table_and_has_its_sections_and_exercises(notebook):
    first, text = notebook.cells[0].source, prose(notebook)
    assert first.startswith(f"# {notebook.metadata['name'].split('_')[0]}. ")
    assert re.search(r"\]\(https?://", first), "a paper with its link"
    assert "| in |" in first.replace("*", "") and "| out |" in first.replace("*", "")
    assert len(re.findall(r"^- ", first.split("You will learn")[1], flags=re.M)) <= 4
    places = [text.find(heading) for heading in HEADINGS]
    assert -1 not in places and places == sorted(places)
    cell, = [cell for cell in notebook.cells if "exercises" in cell.metadata.get("tags", [])]
    exercises = re.split(r"^\d+\. ", cell.source, flags=re.M)[1:]
    assert len(exercises) >= 3
    for exercise in exercises:
        assert re.search(r"\(\d+(–\d+)? min\w*\)", exercise), exercise
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # every lesson that is named is a link
            unlinked = re.sub(r"\[[^\]]*\]\([^)]*\)", "", cell.source)
            assert not re.search(r"\blesson \d\d", unlinked, flags=re.I), cell.id


def test_cells_are_short_and_introduced_and_their_code_is_plain_python_that_asserts(notebook):
    run = 0
    for cell in notebook.cells:
        run = run + 1 if cell.cell_type == "code" else 0
        assert cell.source.strip() and run <= 2, f"{cell.id}: empty, or a third code cell in a row without a sentence"
    for cell in code_cells(notebook):
        lines = [line for line in cell.source.splitlines() if not line.startswith(("import ", "from "))]
        assert len(lines) <= 25, cell.id
        assert not cell.source.rstrip().endswith(";"), cell.id  # nbval's kernel does not see it, and shows the value
        assert not re.search(r"^\s*[!%]", cell.source, flags=re.M) and "except:" not in cell.source, cell.id
    assert sum(cell.source.count("assert ") for cell in code_cells(notebook)) >= 3


def test_outputs_are_compared_and_none_is_an_error_a_warning_a_dead_widget_or_a_large_picture(notebook):
    for output in outputs(notebook):
        data = output.get("data", {})
        assert output.output_type != "error" and output.get("name") != "stderr"
        assert "application/vnd.jupyter.widget-view+json" not in data
        assert len(data.get("image/png", "")) < 4 / 3 * 100_000
    compared = [cell for cell in code_cells(notebook)
                if "nbval-ignore-output" not in cell.metadata.get("tags", [])
                and any("text/plain" in output.get("data", {}) or output.output_type == "stream"
                        for output in cell.outputs)]
    assert len(compared) >= 3


def test_parameters_stand_together_as_constants_and_a_dataclass_of_hyperparameters(notebook):
    tagged = [place for place, cell in enumerate(code_cells(notebook))
              if "parameters" in cell.metadata.get("tags", [])]
    assert 1 <= len(tagged) <= 2 and tagged == list(range(tagged[0], tagged[0] + len(tagged)))
    for node in (node for place in tagged for node in ast.parse(code_cells(notebook)[place].source).body):
        if isinstance(node, ast.ClassDef):
            assert "dataclass" in ast.unparse(node.decorator_list[0])
        else:
            assert all(target.id.isupper() for target in node.targets)


def test_no_function_reads_a_name_that_another_cell_sets(notebook):
    trees = {cell.id: ast.parse(cell.source) for cell in code_cells(notebook)}
    variables = {target.id for tree in trees.values() for node in tree.body
                 if isinstance(node, ast.Assign | ast.AugAssign | ast.For)
                 for target in ast.walk(node) if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
                 and not target.id.isupper()}
    for cell_id, tree in trees.items():
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)):
            own = {a.arg for f in ast.walk(function) if isinstance(f, ast.FunctionDef | ast.Lambda)
                   for a in (*f.args.args, *f.args.kwonlyargs)}
            own |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            if isinstance(function, ast.FunctionDef):
                assert not (read - own) & variables, f"{cell_id}: {function.name} reads {(read - own) & variables}"


def test_two_lessons_do_not_define_the_same_function():
    where: dict[str, list[str]] = {}
    for path in PATHS:
        for cell in code_cells(nbformat.read(path, as_version=4)):
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    where.setdefault(node.name, []).append(path.stem)
    assert {name: books for name, books in where.items() if len(books) > 1} == {}


def test_agents_are_what_the_lesson_cells_define():
    modules = {f"{path.stem.partition('_')[2]}.py": source for path in PATHS if (source := module_of(path))}
    written = {path.name: path.read_text() for path in AGENTS.glob("*.py") if path.name != "__init__.py"}
    assert written == modules, "make agents"


def tables_of(notebook):
    """Yield (names of columns, rows of cells) of every table among the outputs."""
    for output in outputs(notebook):
        for table in BeautifulSoup(output.get("data", {}).get("text/html", ""), "html.parser").find_all("table"):
            names, *_ = [[cell.get_text() for cell in row.find_all("th")] for row in table.thead.find_all("tr")]
            yield names, [[cell.get_text() for cell in row.find_all(["th", "td"])]
                          for row in table.tbody.find_all("tr")]


def test_no_two_lessons_nor_results_state_different_numbers_of_a_model():
    said: dict[tuple, dict[float, list[str]]] = {}

    def say(key, value, where):
        said.setdefault(key, {}).setdefault(round(float(value), 3), []).append(where)
    for path in sorted((PROJECT / "res").glob("[01]*.json")):
        for row in json.loads(path.read_text())["table"]:
            for column in ("NDCG@10", "HR@10", "MRR", "reward@10"):
                say((row["model"], column), row[column], path.name)
    lessons = 0
    for path in PATHS:
        for names, rows in tables_of(nbformat.read(path, as_version=4)):
            lessons += "NDCG@10 over seeds" in names  # the tables of held-out numbers
            for row in rows if "NDCG@10 over seeds" in names else ():
                for column in ("NDCG@10", "HR@10", "MRR", "reward@10"):
                    say((row[names.index("model")], column), row[names.index(column)], path.stem)
            if "predicted" in names and "observed" in names:  # of the agents' critics, in lessons 09 and 10b
                for row in rows:
                    if row[1] != "NaN":
                        say((row[0].lower(), "predicted"), row[names.index("predicted")], path.stem)
                        say((row[0].lower(), "observed"), row[names.index("observed")], path.stem)
    assert lessons >= 6 and len({name for name, column in said if column == "predicted"}) >= 4
    assert {key: where for key, where in said.items() if len(where) > 1} == {}


def test_the_slate_that_lesson_00_opens_with_is_the_one_of_lesson_05():
    cells = nbformat.read(NOTES / "00_architecture.ipynb", as_version=4).cells
    said = next(cell.source for cell in cells if "| slate |" in cell.source)
    said = [[part.strip() for part in line.strip("| ").split("|")] for line in said.splitlines()
            if line.startswith("| ")]
    names, rows = next((names, rows) for names, rows in tables_of(nbformat.read(NOTES / "05_ddpg.ipynb", as_version=4))
                       if names[1:] == ["rated before", "stars", "slate"])
    assert said[0] == names[1:] and len(said) == 1 + len(rows) == 11
    for line, (_, *row) in zip(said[1:], rows, strict=True):
        assert all(a == b or (b.endswith("...") and a.startswith(b[:-3])) for a, b in zip(line, row, strict=True))


def test_figures_are_small_enough_to_be_shown_at_once():
    assert [path.name for path in (PROJECT / "res").glob("*.png") if path.stat().st_size >= 100_000] == []


def test_sections_named_beside_the_articles_are_there():
    rows = [line.split("|") for line in (PROJECT / "docs" / "articles.md").read_text().splitlines() if "](../n" in line]
    rows = [row for row in rows if len(row) > 3]
    assert len(rows) > 15
    for _, _, where, sections, *_ in rows:
        books = [nbformat.read(NOTES / name, as_version=4) for name in re.findall(r"notes/(\w+\.ipynb)", where)]
        headings = {re.sub(r"^[\d. ]*", "", line.lstrip("# ")).partition(":")[0] for book in books
                    for line in prose(book).splitlines() if line.startswith("#")}
        for section in re.split(r"; |, (?=DRR)", sections.strip()):
            assert section.partition(":")[0] in headings, (where, section, headings)
