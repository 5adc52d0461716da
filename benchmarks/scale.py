"""How the price of a step and of a whole run grows with the data: `python -m benchmarks.scale [DATASET …]`.

Without a data set: one update of lesson 05's DDPG at four sizes of a SYNTHETIC catalogue, in turns, beside the same
update with its sums over the whole catalogue. With data sets: `make run` of each, its minutes, memory and disk.
Writes res/bench_scale.json.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers import datasets, training
from helpers.agents import ddpg
from helpers.files import PROJECT, build_dir, data_dir, write_json
from helpers.frames import Frames
from tools.readme import replace_block

SIZES, WHOLE = (1_682, 3_706, 27_278, 200_000), 27_278  # the update with whole sums is measured up to there
ROUNDS, STEPS, BATCH_SIZE = 12, 3, 512
SLATE = ("01_data_parsing", "02_embeddings", "03_pca", "05_ddpg")  # the lessons that lesson 05's slate takes
PATH = PROJECT / "res" / "bench_scale.json"


def popular_frames(n_items: int, n_users: int = 1_000, n_ratings: int = 100) -> Frames:
    """Return transitions of SYNTHETIC ratings, the k-th item taken 1/k as often as the first (Zipf's law)."""
    rng, n = np.random.default_rng(0), n_users * n_ratings
    taken = 1 / np.arange(1, n_items + 1)
    ratings = pd.DataFrame({"user_id": np.repeat(np.arange(n_users), n_ratings), "timestamp": np.arange(n),
                            "item_id": rng.choice(n_items, n, p=taken / taken.sum()),
                            "rating": rng.integers(1, 11, size=n) / 2})
    return Frames(ratings, np.arange(n_items), rng.normal(size=(n_items, 128)).astype(np.float32))


def stepper(frames: Frames, whole: bool) -> Callable[[Tensor], None]:
    """Return lesson 05's update with its settings, or the same that sums over the whole catalogue."""
    settings = ddpg.DDPGSettings()
    agent = ddpg.new_agent(0, 10, frames.embed_size, **settings.for_agent())

    def step(index: Tensor) -> None:
        sums = mock.patch.object(ddpg, "sampled_items", lambda *both: both) if whole else contextlib.nullcontext()
        with training.autocast("cpu"), sums:
            ddpg.update(agent, frames, index, **settings.for_update())
    return step


def updates() -> dict[str, dict]:
    """Return seconds an update by way: all ways take turns, the first one changing."""
    ways = {}
    for n_items in SIZES:
        frames = popular_frames(n_items)
        ways[f"{n_items} items"] = (stepper(frames, False), frames)
        if n_items <= WHOLE:
            ways[f"{n_items} items, whole sums"] = (stepper(frames, True), frames)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name in sorted(ways, reverse=bool(turn % 2)):
            step, frames = ways[name]
            index = torch.randint(len(frames), (STEPS, BATCH_SIZE), generator=torch.Generator().manual_seed(turn))
            started = time.perf_counter()
            for some in index:
                step(some)
            if turn:  # the first round warms up
                seconds[name].append((time.perf_counter() - started) / STEPS)
    return {name: {"seconds": median(rounds), "rounds": rounds} for name, rounds in seconds.items()}


def ratios(rows: dict[str, dict]) -> dict[str, float]:
    """Return how much longer an update is than at 1,682 items: paired by round, then the median."""
    def times(way: str, other: str = f"{SIZES[0]} items") -> float:
        return median(a / b for a, b in zip(rows[way]["rounds"], rows[other]["rounds"], strict=True))
    return {f"update_{n}_vs_{SIZES[0]}": times(f"{n} items") for n in SIZES[1:]} | {
        f"whole_{WHOLE}_vs_sampled": times(f"{WHOLE} items, whole sums", f"{WHOLE} items")}


def whole_run(dataset: str, quick: bool) -> float:
    """Run every lesson on a data set anew; return minutes."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tools.run", "--dataset", dataset, "--force", *["--quick"] * quick],
                   cwd=PROJECT, check=True)
    return (time.perf_counter() - started) / 60


def run_row(dataset: str, minutes: float | None) -> dict:
    """Return what the last run of a data set took; its minutes are those of the lessons, one by one, unless given."""
    record = json.loads((data_dir(dataset) / "run.json").read_text(encoding="utf-8"))
    ratings = datasets.read_ratings(datasets.fetch(dataset))
    disk = sum(path.stat().st_size for folder in (data_dir(dataset), build_dir(dataset))
               for path in folder.rglob("*") if path.is_file())
    seconds = {name: known["seconds"] for name, known in record.items()}
    return {"ratings": len(ratings), "films": int(ratings["item_id"].nunique()), "lessons": len(record),
            "minutes": round(minutes or sum(seconds.values()) / 60, 1),
            "minutes to a slate": round(sum(seconds[name] for name in SLATE) / 60, 1),
            "peak_gb": max(known["peak_gb"] for known in record.values()),
            "disk_gb": round(disk / 1e9, 2), "threads": torch.get_num_threads()}


def table(runs: dict[str, dict]) -> str:
    """Return what whole runs took, as docs/own_data.md shows it."""
    if not runs:
        return "`python -m benchmarks.scale ml-100k ml-1m` measures whole runs: minutes, memory, disk. None is stored."
    lines = ["| data set | ratings | items | lessons | minutes | of them to a slate | memory, GB | disk, GB |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    lines += [f"| {name} | {row['ratings']:,} | {row['films']:,} | {row['lessons']} | {row['minutes']:.0f} | "
              f"{row['minutes to a slate']:.0f} | {row['peak_gb']:.1f} | {row['disk_gb']:.1f} |"
              for name, row in runs.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("datasets", nargs="*")
    parser.add_argument("--quick", action="store_true", help="short runs: one seed and few steps")
    parser.add_argument("--stored", action="store_true", help="run nothing: say what the last run took")
    options = parser.parse_args()
    chosen = options.datasets
    result = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {"runs": {}}
    if not chosen:
        rows = updates()
        result |= {"data": "SYNTHETIC", "threads": torch.get_num_threads(), "batch_size": BATCH_SIZE,
                   "bfloat16": training.autocast("cpu")._enabled, "rows": rows, "ratios": ratios(rows)}
        print(*(f"{name:<32}{1000 * row['seconds']:8.1f} ms" for name, row in rows.items()), sep="\n")
        print(*(f"{name:<32}{value:8.2f}" for name, value in result["ratios"].items()), sep="\n")
    for dataset in chosen:
        row = run_row(dataset, None if options.stored else whole_run(dataset, options.quick))
        result["runs"][data_dir(dataset).name + ", short run" * options.quick] = row
        print(dataset, row)
    write_json(PATH, result)
    replace_block("sizes", table(result["runs"]))


if __name__ == "__main__":
    main()
