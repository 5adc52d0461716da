"""What is done to a notebook: find what it depends on, shorten it, execute it, say where it failed."""

import ast
import atexit
import contextlib
import hashlib
import json
import os
import re
import resource
import sys
import tempfile
import textwrap
from base64 import b64decode, b64encode
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from helpers.files import DEFAULT_DATASET, PROJECT
from tools import export

# what --quick puts in the place of parameters: the same code in a minute or two, for whoever tries whether it runs
QUICK = {"SEEDS": "(0,)", "MAX_STEPS": "20", "MAX_PASSES": "3", "VALIDATE_EVERY": "10", "TRIAL_STEPS": "10",
         "ABLATION_STEPS": "10", "FQE_STEPS": "10", "JUDGE_STEPS": "10", "ROUNDS": "2", "REPEATS": "2",
         "pretrain": "10"}


def code_of(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the sources of a notebook's code cells."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def modules_of(sources: list[str], found: set[Path] | None = None) -> set[Path]:
    """Return the files of helpers that sources import, directly or through each other."""
    found = set() if found is None else found
    nodes = []
    for source in sources:
        with contextlib.suppress(SyntaxError):  # a magic, or a slip: the kernel will say which cell
            nodes += ast.walk(ast.parse(source))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
            place = PROJECT.joinpath(*node.module.split("."))
            for path in (place.with_suffix(".py"), *(place / f"{alias.name}.py" for alias in node.names)):
                if path.exists() and path not in found:
                    found.add(path)
                    modules_of([path.read_text(encoding="utf-8")], found)
    return found


def fingerprint(notebook: nbformat.NotebookNode, upstream: list[str], source: list | None,
                given: list[Path] = ()) -> str:
    """Return a hash of all a lesson depends on; `source` are the raw files, `given` others that no lesson writes."""
    code = code_of(notebook)
    pins = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    if any("cluster.connected" in cell for cell in code):  # Ray may come later, or WORKERS change
        pins += f"{find_spec('ray') is not None} {os.environ.get('RECNN_WORKERS')} {os.environ.get('RAY_ADDRESS')}"
    files = [*sorted(modules_of(code)), *(path for path in given if path.exists())]
    if any("build_dir" in cell for cell in code):  # it fills a folder whose sources are in build/
        files += sorted(path for path in (PROJECT / "build").iterdir() if path.is_file())
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]  # an editor's files too
    return hashlib.sha256(json.dumps([code, texts, pins, upstream, source]).encode()).hexdigest()


def without_toys(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the notebook without what is trained on toys, which no data set can change."""
    notebook.cells = [cell for cell in notebook.cells if "toy" not in cell.metadata.get("tags", [])]
    return notebook


def without_sentences(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the notebook without what it holds its text against: of other data than ML-100K the text says nothing."""
    for cell in notebook.cells:
        lines = cell.source.split("\n")
        with contextlib.suppress(SyntaxError):
            for node in ast.walk(ast.parse(cell.source if cell.cell_type == "code" else "")):
                if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
                        and getattr(node.value.func, "id", "") in ("says", "text_says")):
                    first, last = node.lineno - 1, node.end_lineno or node.lineno
                    lines[first:last] = [" " * node.col_offset + "pass", *[""] * (last - first - 1)]
            cell.source = "\n".join(lines)
    return notebook


def shortened(notebook: nbformat.NotebookNode, values: dict[str, str]) -> nbformat.NotebookNode:
    """Return the notebook with these values in the place of its parameters."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            for name, value in values.items():
                cell.source = re.sub(rf"^( *{name}(?:: \w+)?) = [^#\n]*", rf"\1 = {value}  ", cell.source, flags=re.M)
    return notebook


class Client(NotebookClient):
    """A client that also says how far the kernel's own progress bars are, and which of its kind have a kernel."""

    running: ClassVar[set["Client"]] = set()
    on_step: Callable[[float, float], None]

    def handle_comm_msg(self, outs, msg, cell_index):
        super().handle_comm_msg(outs, msg, cell_index)
        state = self.widget_state.get(msg["content"]["comm_id"], {})
        if state.get("_model_name") == "FloatProgressModel" and state.get("max"):
            self.on_step(state.get("value", 0), state["max"])


def execute(notebook: nbformat.NotebookNode, on_cell: Callable[[], None], folder: Path = export.NOTES,
            dataset: str = DEFAULT_DATASET, on_step: Callable[[float, float], None] = lambda done, of: None,
            threads: int | None = None) -> float:
    """Run every cell in a fresh kernel of this Python in `folder`, tidy the outputs; return its most memory, GB.

    `on_cell` is called after each code cell, `on_step` with (steps done, of how many) as a cell's own progress bar
    moves. `threads` are the kernel's, unless the environment says how many; None: as many as it takes.
    CellExecutionError: a cell, or a figure that it draws, fails. DeadKernelError: the kernel dies; with its last words.
    """
    peak = 0.0

    def executed(cell, cell_index, execute_reply):
        nonlocal peak
        peak = peak_gb(client.km.provisioner.process.pid)
        on_cell()
        for output in cell.outputs:
            if output.output_type == "error":  # of a figure that is drawn after the cell
                raise CellExecutionError("\n".join(output.traceback), output.ename, output.evalue)

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = Client(notebook, timeout=None, kernel_name="python3", coalesce_streams=True,
                    on_cell_executed=executed, resources={"metadata": {"path": str(folder)}}, record_timing=False)
    client.on_step = on_step
    client.create_kernel_manager()
    client.km.kernel_spec_manager = KernelSpecManager(kernel_dirs=[])  # no python3 of another Python in JUPYTER_PATH
    with tempfile.TemporaryFile("w+") as words:
        try:
            few = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads)) if threads else {}
            Client.running.add(client)
            client.execute(env={**few, **os.environ, "RECNN_DATASET": dataset}, stderr=words)
        except (DeadKernelError, RuntimeError) as error:
            if isinstance(error, CellExecutionError):
                raise
            atexit.unregister(client._cleanup_kernel)  # or it fails once more, when Python ends
            words.seek(0)
            raise DeadKernelError(f"{error}. Its last words: {words.read().strip()[-2000:] or 'none'}") from error
        finally:
            Client.running.discard(client)
    from helpers.plots import few_colours  # with seaborn behind it: a run that finds all up to date does without
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # a progress bar is for the one who waits, not for the one who reads
            cell.outputs = [output for output in cell.outputs
                            if "application/vnd.jupyter.widget-view+json" not in output.get("data", {})]
            for data in (output.data for output in cell.outputs if "image/png" in output.get("data", {})):
                data["image/png"] = b64encode(few_colours(b64decode(data["image/png"]))).decode()
    unit = 1 << (30 if sys.platform == "darwin" else 20)  # bytes there, kilobytes elsewhere
    return round(peak or resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit, 2)


def peak_gb(pid: int) -> float:
    """Return the most memory that a process has held, in GB, where Linux's /proc says it, else 0."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) / (1 << 20) if found else 0.0


def explain(name: str, notebook: nbformat.NotebookNode, error: Exception) -> str:
    """Say which notebook and cell failed, show the cell, and give the error."""
    done = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.get("execution_count")]
    reason = f"{error.ename}: {error.evalue}" if isinstance(error, CellExecutionError) else str(error)
    reason = re.sub(r"\x1b\[[0-9;]*m", "", reason)
    if not done:
        return f"\nnotes/{name}.ipynb did not start: {reason}\n"
    source = textwrap.indent(done[-1].source, "    ")
    return f"\nnotes/{name}.ipynb stopped in code cell [{len(done)}]:\n\n{source}\n\n{reason}\n"
