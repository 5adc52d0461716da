import json
import os
import subprocess
import sys

import nbformat
import pytest

from tools import colab
from tools.lessons import LESSONS, before

# in the place of pip and of the run: write down what they were called with
STAND_IN = """
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([sys.argv[1:], os.getcwd(), os.environ["PYTHONPATH"]]) + "\\n")
"""


def copied(place, repo, name):
    """Return the cells of the copy of a lesson."""
    colab.write(repo, place, [name])
    return nbformat.read(place / f"{name}.ipynb", as_version=4).cells


@pytest.fixture
def project(tmp_path):
    """Return a tiny repository to clone from."""
    place = tmp_path / "project"
    for name, text in {"pip.py": STAND_IN, "tools/run.py": STAND_IN, "notes/README": "",
                       "requirements.txt": "ipykernel==7\nnumpy==9\nipywidgets==8\n-r build/requirements.txt\n",
                       "constraints.txt": "comm==1\njupyter_core==5\nnumpy==9\ncommon==2\n"}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *command], cwd=place, check=True)
    return place


def run(source, tmp_path):
    """Run a cell as a fresh runtime would, and return how it ended and what pip and the run were called with."""
    calls = tmp_path / "calls"
    calls.write_text("")
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "CALLS": str(calls)}
    ended = subprocess.run([sys.executable, "-c", source + "\nprint(os.getcwd(), sys.path[0])"], cwd=tmp_path,
                           env=environment, capture_output=True, text=True)
    return ended, [json.loads(line) for line in calls.read_text().splitlines()]


def test_the_first_cell_brings_the_project_its_packages_and_what_the_lesson_reads(project, tmp_path):
    source = copied(tmp_path / "copies", project.as_uri(), "09_diagnostics")[1].source
    home = str(tmp_path / "recnn")
    for _ in range(2):  # the second time the clone is there
        ended, ((pip, *where), (series, *there)) = run(source, tmp_path)
        assert ended.stdout.split() == [f"{home}/notes", home], ended.stderr
        assert pip == ["install", "--quiet", "-r", "colab-requirements.txt", "-c", "colab-constraints.txt"]
        assert series == ["--quick", "--chain", "01", "03", "05", "05b", "06", "07", "08"]
        assert where == there == [home, home]
    left = {"requirements": "numpy==9 -r build/requirements.txt", "constraints": "numpy==9 common==2"}
    for name, packages in left.items():
        assert (tmp_path / "recnn" / f"colab-{name}.txt").read_text().split() == packages.split()


def test_a_python_too_old_or_packages_already_loaded_are_said_in_a_sentence(project, tmp_path):
    source = copied(tmp_path / "copies", project.as_uri(), "00_architecture")[1].source
    assert "UPSTREAM = " in source and "(3, 11), []" in source
    ended, calls = run(source.replace("(3, 11)", "(9, 1)"), tmp_path)
    assert ended.returncode == 1 and not calls
    assert ended.stderr.startswith("the lessons want Python 9.1 or newer; this runtime has 3.")
    loaded = "import sys, types\nsys.modules['pandas'] = types.SimpleNamespace(__version__='0.1')\n"
    ended, calls = run(loaded + source, tmp_path)
    assert ended.stderr.startswith("other versions were loaded before") and len(calls) == 1  # pip's
    ended, calls = run(source, tmp_path)
    assert ended.returncode == 0 and len(calls) == 1  # lesson 00 reads from none


@pytest.mark.parametrize("name", LESSONS)
def test_every_lesson_gets_one(name, tmp_path):
    about, setup, title, *rest = copied(tmp_path, "https://github.com/you/recnn", name)
    link = f"(https://colab.research.google.com/github/you/recnn/blob/main/notes/{name}.ipynb)"
    assert about.source.startswith("[![Open in Colab]") and link in about.source and title.source.startswith("# ")
    assert str([each.partition("_")[0] for each in before(name)]) in setup.source.splitlines()[0]
    compile(setup.source, name, "exec")
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in (setup, *rest))


def test_the_link_is_there_where_the_address_is_of_github_and_one_that_cannot_be_cloned_is_refused(tmp_path):
    for repo, owner in (("https://github.com/a.b/c.git", "a.b/c"), ("https://x.org/y/z", None)):
        about, setup, *_ = copied(tmp_path, repo, "00_architecture")
        assert f"/github/{owner}/blob/main" in about.source if owner else "](" not in about.source
        assert repr(repo) in setup.source.splitlines()[0]
    for repo in ("", "you/recnn", "https://github.com", "https://github.com/you/my repo", "ssh://x/y'"):
        with pytest.raises(SystemExit, match="is no address to clone from"):
            colab.write(repo, tmp_path / "copies")
    assert not (tmp_path / "copies").exists()
