import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from helpers import files
from helpers.extra import cluster
from tools import lessons, notebooks
from tools import run as series
from tools.lessons import LESSONS, Lesson
from tools.readme import block, page_of


@pytest.fixture
def small_series(tmp_path, monkeypatch):
    """Return a function that lays a series of two tiny notebooks and runs it."""
    notes, raw = tmp_path / "notes", tmp_path / "clicks"
    notes.mkdir()
    raw.mkdir()
    (raw / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,5,0\n")
    monkeypatch.setattr(series, "NOTES", notes)
    monkeypatch.setattr(series, "fetch_model", lambda *_: None)
    monkeypatch.setattr(series, "look_over", lambda raw: [])
    monkeypatch.setattr(series, "LESSONS", {"01_a": Lesson((), ("a.txt",)),
                                            "02_b": Lesson(("a.txt", "res/given.json"), ("res/b.txt",))})
    for module in (series, lessons):
        monkeypatch.setattr(module, "data_dir", lambda dataset: files.data_dir(dataset, tmp_path))
        monkeypatch.setattr(module, "res_dir", lambda dataset: files.res_dir(dataset, tmp_path))
    monkeypatch.setattr(series, "shown", lambda path: path.name)

    def run(first="x = 1", second="y = 2", options=()):
        home = tmp_path / "data" / "clicks"
        writes = {"01_a": home / "a.txt", "02_b": home / "res" / "b.txt"}
        for name, source in {"01_a": first, "02_b": second}.items():
            write = f"from pathlib import Path; p = Path({str(writes[name])!r}); p.parent.mkdir(exist_ok=True)\n"
            cells = [source, "" if "no output" in source else write + "p.write_text(str(p.exists()))"]
            book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells if cell])
            nbformat.write(book, notes / f"{name}.ipynb")
        return series.main(["--dataset", str(raw), *options]), home
    return run


def ran(captured):
    return [line.split()[0] for line in captured.out.splitlines() if line.startswith("0") and "kept" not in line]


def test_runs_in_order_and_does_not_redo_what_is_up_to_date(small_series, capfd):
    code, home = small_series()
    assert code == 0 and ran(capfd.readouterr()) == ["01_a", "02_b"]
    assert nbformat.read(home / "notes" / "02_b.ipynb", as_version=4).cells[0].execution_count == 1
    assert small_series()[0] == 0 and ran(capfd.readouterr()) == []
    assert small_series(second="y = 3")[0] == 0 and ran(capfd.readouterr()) == ["02_b"]
    assert small_series(first="x = 2", second="y = 3")[0] == 0 and ran(capfd.readouterr()) == ["01_a", "02_b"]
    (home / "res" / "given.json").write_text("{}")  # what no lesson writes
    assert small_series(first="x = 2", second="y = 3")[0] == 0 and ran(capfd.readouterr()) == ["02_b"]
    (home / "a.txt").unlink()
    assert small_series(first="x = 2", second="y = 3")[0] == 0 and ran(capfd.readouterr()) == ["01_a", "02_b"]


def test_lessons_that_do_not_read_from_each_other_run_side_by_side(small_series, monkeypatch, capfd):
    monkeypatch.setattr(series.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(series, "LESSONS", {"01_a": Lesson((), ("a.txt",)), "02_b": Lesson((), ("res/b.txt",))})
    meet = ("import os, time, pathlib; assert os.environ['OMP_NUM_THREADS'] == '2'; pathlib.Path('{}').touch()\n"
            "until = time.monotonic() + 20\nwhile not pathlib.Path('{}').exists(): assert time.monotonic() < until")
    late = "import time; time.sleep(1)\n" + meet.format("one", "other")  # ends last, and stands first
    assert small_series(late, meet.format("other", "one"))[0] == 0 and ran(capfd.readouterr()) == ["01_a", "02_b"]
    alone = "import os; assert 'OMP_NUM_THREADS' not in os.environ"
    for name in ("ONE_LANE", "LANES"):
        with monkeypatch.context() as only:
            only.setattr(series, name, 1)
            assert small_series(alone, alone, ["--force"])[0] == 0


def test_of_a_large_table_one_seed_is_trained_and_this_is_said(small_series, monkeypatch, capfd):
    monkeypatch.setattr(series, "ONE_SEED", 39)  # bytes; the table has 40
    assert small_series()[0] == 0 and "one seed of each agent" in capfd.readouterr().out
    seen = []
    monkeypatch.setattr(series, "shortened", lambda lesson, values: seen.append(values) or lesson)
    small_series()
    assert seen == 2 * [{"SEEDS": "(0,)"}]
    monkeypatch.setattr(series, "ONE_SEED", 40)
    assert small_series()[0] == 0 and seen[2:] == 2 * [{}] and "one seed" not in capfd.readouterr().out


def test_the_run_sees_a_cells_own_progress_bar_and_tidies_the_outputs_of_it(monkeypatch, tmp_path):
    monkeypatch.setattr(series, "NOTES", tmp_path)
    cells, steps = [], []
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(
        "from tqdm.auto import tqdm\nfor _ in tqdm(range(7), mininterval=0, leave=False):\n    pass\n"
        "held = b'1' * 400_000_000\nprint('done')")])
    peak = series.execute(book, lambda: cells.append(1), on_step=lambda *step: steps.append(step))
    assert 0.4 < peak < 2
    assert len(cells) == 1 and steps[-1] == (7, 7)
    assert [output.get("text") for output in book.cells[0].outputs] == ["done\n"]


FIGURE = ("import matplotlib.pyplot as plt\nfrom matplotlib.ticker import FuncFormatter\n"
          "figure, axis = plt.subplots()\naxis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: 1 / 0))")


@pytest.mark.parametrize(("second", "words"), [
    ("raise ValueError('no film')", ["stopped in code cell [1]", "    raise ValueError(", "ValueError: no film"]),
    (FIGURE, ["stopped in code cell [1]", "ZeroDivisionError"]),  # when it is drawn
    ("import os, sys; print('the last words', file=sys.__stderr__, flush=True); os._exit(7)", ["the last words"]),
    ("y = 'no output'", ["did not write b.txt"])])
def test_what_fails_stops_the_run_with_its_name_and_its_error(small_series, capfd, second, words):
    code, home = small_series(second=second)
    error = capfd.readouterr().err
    assert code == 1 and all(word in error for word in ["notes/02_b.ipynb", *words])
    assert not (home / "res" / "b.txt").exists()
    assert list(json.loads((home / "run.json").read_text())) == ["01_a"]


def test_the_failing_cell_is_shown_even_if_the_notebook_was_run_before(monkeypatch, tmp_path):
    monkeypatch.setattr(series, "NOTES", tmp_path)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, execution_count=number) for number, source
                                           in enumerate(("x = 1", "1 / 0", "y = 2"), start=1)])
    with pytest.raises(series.CellExecutionError) as caught:
        series.execute(book, lambda: None)
    message = series.explain("02_b", book, caught.value)
    assert "code cell [2]" in message and "    1 / 0" in message and "ZeroDivisionError" in message


@pytest.mark.parametrize("name", ["RECNN_WORKERS", "RAY_ADDRESS"])
def test_who_asks_for_workers_without_ray_is_told_how_to_get_it(monkeypatch, capfd, name):
    monkeypatch.setenv(name, "2")
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    assert series.main([]) == 1
    assert "pip install -r requirements-ray.txt" in capfd.readouterr().err


def test_all_that_is_wrong_with_the_tables_is_said_before_any_lesson_starts(tmp_path, capfd):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,five,0\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n1,A,B\n1,C,D\n")
    assert series.main(["--dataset", str(tmp_path)]) == 1
    error = capfd.readouterr().err
    assert "line 2: rating 'five' is not one of" in error and "line 3: item_id '1' is there for the second" in error


def test_what_is_too_small_is_refused_with_all_reasons_and_what_is_assumed_is_said(tmp_path):
    def lay(n_users, n_items):
        rows = [f"u{user},{item}\n" for user in range(n_users) for item in range(14)]
        (tmp_path / "ratings.csv").write_text("userId,movieId\n" + "".join(rows))
        items = [f"{item},A,B\n" for item in range(n_items)]
        (tmp_path / "movies.csv").write_text("movieId,title,genres\n" + "".join(items))
        return tmp_path

    with pytest.raises(files.DataError) as error:
        series.look_over(lay(1, 14))
    assert "1 users" in str(error.value) and "14 items" in str(error.value)
    assert [sentence.split(":")[0] for sentence in series.look_over(lay(10, 20))] == [
        "ratings.csv has no column rating, only user_id, item_id", "ratings.csv has no column timestamp",
        "the users' ids are words"]


def test_a_kernel_that_does_not_start_is_said(small_series, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    assert small_series()[0] == 1
    assert "did not start" in (error := capfd.readouterr().err) and "encodings" in error and "Traceback" not in error


def test_the_kernel_is_of_this_python_and_of_this_data_set(small_series, monkeypatch, tmp_path):
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    second = "import os, sys; assert os.environ['RECNN_DATASET'].endswith('clicks')\n"
    assert small_series(second=f"{second}assert sys.executable == {sys.executable!r}")[0] == 0
    assert "RECNN_DATASET" not in os.environ


def test_a_number_chooses_one_lesson_and_one_that_is_not_there_is_named(small_series, monkeypatch, capfd):
    monkeypatch.setattr(series, "LESSONS", {"01_a": Lesson((), ("a.txt",)), "02_b": Lesson(("a.txt",), ("res/b.txt",)),
                                            "02b_c": Lesson(("res/b.txt",))})
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("z = 1")]), series.NOTES / "02b_c.ipynb")
    for first, options, lessons_run in (("x = 1", ("--chain", "01"), ["01_a"]), ("x = 1", ("--force", "02"), ["02_b"]),
                                        ("x = 3", ("--chain", "02b"), ["01_a", "02_b", "02b_c"])):
        assert small_series(first, options=options)[0] == 0 and sorted(ran(capfd.readouterr())) == lessons_run
    assert small_series("x = 3", "y = 9", ("--force", "--chain", "02b"))[0] == 0  # what is up to date is kept
    assert sorted(ran(capfd.readouterr())) == ["02_b", "02b_c"]
    assert small_series(options=("5",))[0] == 1
    assert "there is no lesson 5; there are 01, 02, 02b" in capfd.readouterr().err


def test_quick_shortens_the_parameters_alone_and_leaves_out_toys():
    cells = [nbformat.v4.new_code_cell("SEEDS = (0, 1, 2)  # one training each\nK = 5\n    pretrain: int = 400"),
             nbformat.v4.new_code_cell("SEEDS = (1, 2)"), nbformat.v4.new_code_cell("toy = 1")]
    cells[0].metadata["tags"], cells[2].metadata["tags"] = ["parameters"], ["toy"]
    book = series.without_toys(series.shortened(nbformat.v4.new_notebook(cells=cells), series.QUICK))
    assert [cell.source for cell in book.cells] == [
        "SEEDS = (0,)  # one training each\nK = 5\n    pretrain: int = 10  ", "SEEDS = (1, 2)"]


def test_of_other_data_no_sentence_of_the_text_is_held():
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(
        "x = []\nif not x:\n    says('it is', x[0],\n         x[0] > 1)\ntext_says(D, 'a', 1 / 0, True)\ny = 2")])
    source = series.without_sentences(book).cells[0].source
    scope: dict = {}
    exec(source, scope)
    assert scope["y"] == 2 and "says" not in source


def test_ctrl_c_is_a_sentence_and_leaves_no_kernel(monkeypatch, tmp_path):
    program = (
        "import sys, nbformat; from tools import lessons, run as series; from pathlib import Path\n"
        "series.NOTES, series.LESSONS = Path(sys.argv[1]), {'01_a': lessons.Lesson()}\n"
        "series.fetch_model, series.look_over = (lambda *_: None), (lambda raw: [])\n"
        "series.data_dir = series.res_dir = lambda dataset: Path(sys.argv[1])\n"
        "sys.exit(series.main(['--dataset', sys.argv[2]]))\n")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,5,0\n")
    source = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), tmp_path / "01_a.ipynb")
    run = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(tmp_path / "raw")],
                           stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    error = run.communicate(timeout=30)[1]
    assert run.returncode == 130 and "interrupted in notes/01_a.ipynb" in error and "Traceback" not in error
    time.sleep(1)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_lesson_depends_on_the_helpers_it_imports_and_on_theirs():
    def names_of(*sources):
        return {path.stem for path in notebooks.modules_of(list(sources))}
    assert names_of("%matplotlib inline", "from helpers import fast") == {"fast"}  # a magic stops nothing
    assert names_of("from helpers.frames import Frames") == {"frames", "fast", "tables", "files"}
    assert {"films", "tmdb"} <= names_of("from helpers.extra import films")
    assert {"diagnostics", "networks"} <= names_of("from helpers.agents.diagnostics import critic_of")
    assert names_of("import numpy") == set()


def test_fingerprint_ignores_prose_and_sees_code_and_data():
    def book(code, prose="hello"):
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(prose), nbformat.v4.new_code_cell(code)])
    base = series.fingerprint(book("x = 1"), [], "raw")
    assert series.fingerprint(book("x = 1", "other words"), [], "raw") == base
    assert len({base, series.fingerprint(book("x = 2"), [], "raw"), series.fingerprint(book("x = 1"), ["up"], "raw"),
                series.fingerprint(book("x = 1"), [], "other")}) == 4


def test_a_page_shows_the_committed_numbers():
    table = series.held_out_numbers(files.PROJECT / "res")
    assert block("results", series.results_table(table)) in page_of("results").read_text()


def test_every_lesson_reads_what_an_earlier_one_writes_or_what_is_committed():
    written = set()
    for name, lesson in LESSONS.items():
        given = set(lesson.reads) - written
        assert all((files.PROJECT / path).exists() for path in given), f"{name} reads {given}"
        written |= set(lesson.writes)


def test_a_lesson_is_stale_when_what_it_reads_or_imports_from_another_changes():
    upstream = [name.split("_")[0] for name in lessons.before("10b_off_policy")]
    assert upstream == ["01", "02", "03", "05b", "06", "07", "08"]
    code = series.code_of(nbformat.read(series.NOTES / "10b_off_policy.ipynb", as_version=4))
    diagnostics = files.PROJECT / "helpers" / "agents" / "diagnostics.py"  # which has lesson 09's critic_of
    assert diagnostics in notebooks.modules_of(code)


def test_make_waits_for_what_a_lesson_reads():
    waits: dict[str, set] = {"data": set()}  # the target check-data holds lessons 00 to 04
    for line in (files.PROJECT / "Makefile").read_text().splitlines():
        if line.startswith("check-") and ":" in line:
            left, right = (re.findall(r"check-(\w+)", side) for side in line.split(":", 1))
            for name in left:
                waits.setdefault(name, set()).update(right)

    def ready(name):
        return {name}.union(*(ready(each) for each in waits.get(name, ())))
    target = {name: name.split("_")[0] if name > "05" else "data" for name in LESSONS}
    for name in list(LESSONS)[list(LESSONS).index("05_ddpg"):]:
        for other in lessons.before(name):
            assert target[other] in ready(target[name]), f"check-{target[name]} reads of {other}"


@pytest.mark.parametrize("name", LESSONS)
def test_the_notebooks_table_and_readmes_row_name_what_the_lesson_reads_and_writes(name):
    first = nbformat.read(series.NOTES / f"{name}.ipynb", as_version=4).cells[0].source.replace("**", "")
    for side, paths in (("in", LESSONS[name].reads), ("out", LESSONS[name].writes)):
        cells = re.findall(rf"^\| {side} \| ([^|]*) \|", first, flags=re.M)
        named = [path.removeprefix("data/<dataset>/") for cell in cells for path in re.findall(r"`([^`]+)`", cell)]
        named = [path.replace("<agent>", agent) for path in named for agent in lessons.AGENTS]
        lacking = [path for path in paths
                   if not any(path == each or (each.endswith("/") and path.startswith(each)) for each in named)]
        assert not lacking, f"the table of notes/{name}.ipynb lacks {side} {lacking}"
    readme = (files.PROJECT / "README.md").read_text()
    row = next(line for line in readme.splitlines() if line.startswith("| [") and f"](notes/{name}.ipynb)" in line)
    for path in re.findall(r"`([\w/.]+\.\w+)`", row.split("|")[4]):
        assert path in {*LESSONS[name].reads, *LESSONS[name].writes, "texts_gpt2.p"}, f"README: {path}"
    minutes = row.split("|")[5].strip()
    outs = [line.split("|")[-2].strip() for line in first.splitlines() if line.startswith("| out |")]
    assert outs[0] == minutes and not any(outs[1:]), "minutes of the notebook's table and of README's row"
    assert LESSONS[name].minutes == (0.3 if minutes == "< 1" else float(minutes))
