"""Write copies of the lessons that fetch what they need when Colab opens them: `make colab REPO=https://…`."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tools.export import NOTES, PROJECT, nbformat
from tools.lessons import LESSONS, before

SITE = "https://colab.research.google.com"
ABOUT = ("The next cell fetches the lessons and their packages, and runs, with few steps, what this lesson reads from. "
         "So the numbers are not those of the text. It takes some minutes.")
SETUP = r'''import os, re, subprocess, sys
from importlib.metadata import version
from pathlib import Path
if sys.version_info < LEAST:
    sys.exit(f"the lessons want Python {LEAST[0]}.{LEAST[1]} or newer; this runtime has {sys.version.split()[0]}")
HOME = Path.home() / "recnn"
if not HOME.exists():
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPO, str(HOME)], check=True)
of_kernel = r"(?m)^(pip|ipy\w*|jupyter\w*|comm|debugpy|pyzmq|tornado|traitlets)==.*$"  # what runs this cell stays
for name in ("requirements.txt", "constraints.txt"):
    (HOME / f"colab-{name}").write_text(re.sub(of_kernel, "", (HOME / name).read_text()))
how = dict(cwd=HOME, check=True, env={**os.environ, "PYTHONPATH": str(HOME)})
files = ["-r", "colab-requirements.txt", "-c", "colab-constraints.txt"]
subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *files], **how)
if any(name in sys.modules and sys.modules[name].__version__ != version(name) for name in ("numpy", "pandas")):
    sys.exit("other versions were loaded before: choose Runtime, Restart session, and run this cell again")
if UPSTREAM:
    subprocess.run([sys.executable, "-m", "tools.run", "--quick", "--chain", *UPSTREAM], **how)
os.chdir(HOME / "notes")
sys.path.insert(0, str(HOME))'''


def write(repo: str, place: Path = PROJECT / ".colab", names: Iterable[str] = LESSONS) -> None:
    """Write lessons to `place`, without outputs, behind a cell that fetches what it needs from `repo`."""
    if not re.fullmatch(r"(https|file)://[^\s'\"]+/[^\s'\"]+", repo):
        sys.exit(f"REPO {repo!r} is no address to clone from, such as https://github.com/you/recnn")
    least = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    github = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", repo)
    place.mkdir(exist_ok=True)
    for name in names:
        book = nbformat.read(NOTES / f"{name}.ipynb", as_version=4)
        for cell in (cell for cell in book.cells if cell.cell_type == "code"):
            cell.outputs, cell.execution_count = [], None
        link = f"{SITE}/github/{github[1]}/blob/main/notes/{name}.ipynb" if github else ""
        badge = f"[![Open in Colab]({SITE}/assets/colab-badge.svg)]({link})\n\n" if github else ""
        upstream = [each.partition("_")[0] for each in before(name)]
        given = f"REPO, LEAST, UPSTREAM = {repo!r}, ({least[1]}, {least[2]}), {upstream}\n"
        book.cells[:0] = [nbformat.v4.new_markdown_cell(badge + ABOUT, id="colab"),
                          nbformat.v4.new_code_cell(given + SETUP, id="colab-setup")]
        nbformat.write(book, place / f"{name}.ipynb")


if __name__ == "__main__":
    write("".join(sys.argv[1:]))
