"""Run the lessons in order: `python -m tools.run` is what `make run` calls."""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import nbformat
import pandas as pd
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm

from helpers.datasets import fetch, fetch_model, read_items, read_links, read_ratings
from helpers.files import DEFAULT_DATASET, PROJECT, DataError, data_dir, replacing, res_dir, shown, write_json
from tools import export
from tools.lessons import LESSONS, artefact, before
from tools.notebooks import (
    QUICK,
    Client,
    code_of,
    execute,
    explain,
    fingerprint,
    shortened,
    without_sentences,
    without_toys,
)
from tools.readme import replace_block

NOTES = export.NOTES
FRAME, SLATE = 10, 10  # ratings in a state, and items on a slate, in all lessons
FEWEST_USERS = 10      # with fewer, a lens of lesson 10 has nobody to look at
MOST_ITEMS = 100_000   # a step of 512 transitions then takes some 3 GB
LANES = 2              # lessons that run side by side, at most
ONE_SEED, ONE_LANE = 20e6, 100e6  # bytes of raw files above which one seed is trained, and lessons run one by one


def state_of(paths: list[Path]) -> list | None:
    """Return (name, size, time) of every path, or None when one is missing."""
    if not all(path.exists() for path in paths):
        return None
    return [[shown(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def look_over(raw: Path) -> list[str]:
    """Return in sentences what is taken for granted of a folder's tables; DataError: all that is wrong with them."""
    read, reasons = [], []
    for reader in (read_ratings, read_items, read_links):
        try:
            read.append(reader(raw))
        except DataError as error:
            reasons.append(str(error))
    if not reasons:
        long = int((read[0]["user_id"].value_counts() >= FRAME + 3).sum())
        n_items = len({*read[0]["item_id"].unique(), *read[1]["item_id"]})
        if long < FEWEST_USERS:
            reasons.append(f"{long} users have {FRAME + 3} ratings or more (a frame of {FRAME}, and one each to learn, "
                           f"for validation, for the test); {FEWEST_USERS} are needed")
        if n_items < 2 * SLATE:
            reasons.append(f"{n_items} items are rated or in the catalogue; slates of {SLATE} need {2 * SLATE} or more")
        if n_items > MOST_ITEMS:
            n_rated = read[0]["item_id"].nunique()
            reasons.append(f"{n_items:,} items are rated or in the catalogue ({n_rated:,} are rated), and every step "
                           f"of a training scores all: up to {MOST_ITEMS:,} can work, so leave out what nobody rated")
    if reasons:
        raise DataError("\n".join(["the lessons cannot work with this data set:", *(f"- {why}" for why in reasons)]))
    return read[0].attrs["assumed"]


def run(dataset: str, only: Sequence[str] = (), in_place: bool = False, force: bool = False,
        quick: bool = False, chain: bool = False) -> int:
    """Run what is not up to date, with `chain` what that reads from too; show progress; return the exit code."""
    number = {name: name.partition("_")[0] for name in LESSONS}
    if unknown := [each for each in only if each not in {*number, *number.values()}]:
        raise DataError(f"there is no lesson {', '.join(unknown)}; there are {', '.join(number.values())}")
    asked = {name for name in LESSONS if not only or {name, number[name]} & set(only)}
    chosen = set(asked)
    for name in reversed(LESSONS) if chain else ():
        if name in chosen:
            chosen.update(before(name, LESSONS))
    if os.environ.get("RECNN_WORKERS") or os.environ.get("RAY_ADDRESS"):  # asked for several workers, which take Ray
        from helpers.extra import cluster  # with PyTorch behind it, so only when needed
        cluster.chosen_workers(), cluster.ray()
    if Path(dataset).expanduser().exists():
        dataset = str(Path(dataset).expanduser().resolve())
    export.write()
    raw = fetch(dataset)
    home, source = data_dir(dataset), state_of(sorted(filter(Path.is_file, raw.iterdir())))
    record_path = home / "run.json"
    record = json.loads(record_path.read_text(encoding="utf-8")) if record_path.exists() else {}
    lessons = {name: nbformat.read(NOTES / f"{name}.ipynb", as_version=4) for name in LESSONS}
    n_bytes = sum(path.stat().st_size for path in raw.iterdir())
    for lesson in lessons.values():
        shortened(lesson, QUICK if quick else {"SEEDS": "(0,)"} if n_bytes > ONE_SEED else {})
        if quick:
            without_toys(lesson)
        if dataset != DEFAULT_DATASET:
            without_sentences(lesson)
    outputs = {name: [artefact(dataset, path) for path in lesson.writes] for name, lesson in LESSONS.items()}
    written = {path for lesson in LESSONS.values() for path in lesson.writes}
    prints: dict[str, str] = {}
    stale = []
    for name, lesson in LESSONS.items():
        upstream = before(name, LESSONS)
        given = {place for path in lesson.reads if path not in written
                 for place in (PROJECT / path, artefact(dataset, path))}
        prints[name] = fingerprint(lessons[name], [prints[each] for each in upstream], source, sorted(given))
        known = record.get(name, {})
        current = known.get("fingerprint") == prints[name] and known.get("outputs") == state_of(outputs[name])
        again = (force and name in asked) or not current or any(each in stale for each in upstream)
        if name in chosen and again:
            stale.append(name)
    if stale:  # what is wrong with a table is said before any lesson starts
        for sentence in look_over(raw):
            print(sentence)
        fetch_model()
    if stale and n_bytes > ONE_SEED and not quick:
        print("a large data set: one seed of each agent is trained, and no table has a spread over seeds")
    minutes = {name: len(code_of(lessons[name])) if quick else LESSONS[name].minutes for name in stale}
    minutes |= {name: record[name]["seconds"] / 60 for name in stale if name in record and not quick}
    bar = tqdm(total=sum(minutes.values()), disable=not stale, delay=0.01,
               bar_format="{desc:<20}{percentage:3.0f}%|{bar}| {elapsed}, about {remaining} to go{postfix}")

    def on_step(done: float, of: float) -> None:
        bar.set_postfix_str(f"step {done:.0f} of {of:.0f}", refresh=sys.stderr.isatty())

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    lanes = 1 if n_bytes > ONE_LANE else min(LANES, cores)  # two lessons want twice the memory

    def finish(name: str) -> None:
        share = minutes[name] / len(code_of(lessons[name]))

        def on_cell() -> None:
            bar.set_postfix_str("", refresh=False)
            bar.update(min(share, bar.total - bar.n))

        started = time.monotonic()
        peak = execute(lessons[name], on_cell, NOTES, dataset, on_step, max(1, cores // lanes) if lanes > 1 else None)
        place = NOTES if in_place else home / "notes"
        with replacing(place / f"{name}.ipynb") as beside:
            nbformat.write(lessons[name], beside)
        record[name] = {"fingerprint": prints[name], "outputs": state_of(outputs[name]),
                        "seconds": round(time.monotonic() - started, 1), "peak_gb": peak}

    waiting, failed, began, running = list(stale), "", time.monotonic(), dict[Future, str]()
    with ThreadPoolExecutor(lanes) as pool:  # each lesson is a process; a thread waits for it
        try:
            while (waiting or running) and not failed:
                ahead = {*waiting, *running.values()}
                for name in [name for name in waiting if not ahead & {*before(name, LESSONS)}][:lanes - len(running)]:
                    running[pool.submit(finish, name)] = name
                    waiting.remove(name)
                bar.set_description_str(", ".join(name.partition("_")[0] for name in running.values()))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name, error = running.pop(future), future.exception()
                    lacking = [shown(path) for path in outputs[name] if not path.exists()]
                    if getattr(error, "ename", "") == "KeyboardInterrupt":
                        raise KeyboardInterrupt
                    if isinstance(error, CellExecutionError | DeadKernelError):
                        failed = explain(name, lessons[name], error)
                    elif error is not None:
                        raise error
                    elif lacking:
                        failed = f"\nnotes/{name}.ipynb ran but did not write {', '.join(lacking)}"
                    else:
                        write_json(record_path, {name: record[name] for name in LESSONS if name in record})
        except KeyboardInterrupt:
            names = ", ".join(f"notes/{name}.ipynb" for name in running.values() or [name])
            bar.close()
            print(f"\ninterrupted in {names}; finished lessons are kept: the same command goes on there",
                  file=sys.stderr)
            return 130
        finally:
            for client in [*Client.running]:  # of the other lane
                client.km.provisioner.process.kill()
    bar.close()
    if failed:
        print(failed, file=sys.stderr)
        return 1
    if in_place and not (numbers := held_out_numbers(res_dir(dataset))).empty:
        replace_block("results", results_table(numbers))
    record = {name: record[name] for name in LESSONS if name in record}  # not as they ended
    print(closing_table(dataset, record, stale, (time.monotonic() - began) / 60))
    if quick:
        print("\nQUICK: one seed and few steps, to see that all runs; these numbers are no results")
    return 0


def closing_table(dataset: str, record: dict, ran: list[str], minutes: float = 0) -> str:
    """Return the table at the end of a run: seconds and artefacts of each lesson, held-out numbers of the policy."""
    lines = [f"\n{'notebook':<20}{'seconds':>9}   wrote"]
    for name, known in record.items():
        wrote = ", ".join(path for path, _, _ in known["outputs"]) or "–"
        seconds = f"{known['seconds']:.0f}" if name in ran else "kept"
        lines.append(f"{name:<20}{seconds:>9}   {wrote}")
    if ran:
        memory = max(record[name]["peak_gb"] for name in ran)
        lines += ["", f"in all {minutes:.0f} minutes; the most memory that a lesson held was {memory:.1f} GB"]
    table = held_out_numbers(res_dir(dataset))
    if len(table):
        lines += ["", f"{dataset}: each user's last interaction, ranked among the whole catalogue",
                  table.to_string(index=False)]
    if "11_ship" in record:
        manifest = artefact(dataset, "build/model/manifest.json")
        known = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
        lines += ["", known["warning"]] if known.get("warning") else []  # ranks no better than the most rated
        option = "" if dataset == DEFAULT_DATASET else f" DATASET={shlex.quote(dataset)}"
        lines += ["", f"to try it in a browser: make serve{option}, then http://127.0.0.1:8000"]
    return "\n".join(lines)


def held_out_numbers(folder: Path) -> pd.DataFrame:
    """Return the table of held-out numbers that the lessons wrote, one row a model, in the order of the lessons."""
    paths = [folder / Path(path).name for lesson in LESSONS.values() for path in lesson.writes
             if path.startswith("res/") and path.endswith(".json")]
    tables = [pd.DataFrame(json.loads(path.read_text(encoding="utf-8"))["table"]) for path in paths if path.exists()]
    return pd.concat(tables).drop_duplicates("model") if tables else pd.DataFrame()


def results_table(table: pd.DataFrame) -> str:
    """Return the README's table of held-out numbers, in Markdown."""
    rows = [[f"{value:.3f}" if isinstance(value, float) else value for value in row]
            for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (table.columns, ["---"] * len(table.columns), *rows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.run", description=__doc__)
    parser.add_argument("only", nargs="*", help="run these lessons alone, e.g. 05 09")
    parser.add_argument("--dataset", default=DEFAULT_DATASET, help="a name, a folder or a .zip")
    parser.add_argument("--workers", default="", help="how many workers lesson 13 has, with Ray")
    parser.add_argument("--in-place", action="store_true", help="write the outputs into notes/, as committed")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to see that all runs")
    parser.add_argument("--copies", type=Path, help="run nothing: write shortened copies of the lessons there")
    parser.add_argument("--chain", action="store_true", help="and the lessons that these read from")
    parser.add_argument("--force", action="store_true", help="run even what is up to date")
    options = parser.parse_args(arguments)
    if options.copies:
        options.copies.mkdir(parents=True, exist_ok=True)
        for name in LESSONS:
            nbformat.write(shortened(nbformat.read(NOTES / f"{name}.ipynb", as_version=4), QUICK),
                           options.copies / f"{name}.ipynb")
        return 0
    if options.in_place:  # what is committed must be as its text says
        os.environ["RECNN_STRICT"] = os.environ["RECNN_COMMITTED"] = "1"
    if options.workers:
        os.environ["RECNN_WORKERS"] = options.workers
    try:
        return run(options.dataset or DEFAULT_DATASET, options.only, options.in_place, options.force, options.quick,
                   options.chain)
    except (DataError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
