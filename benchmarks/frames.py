"""Measure how fast ratings become transitions, beside the ways there were before: `make bench`.

Everything runs on one SYNTHETIC table of the shape of MovieLens 20M (benchmarks/synthetic.py) and one random
item matrix. Each row is a process of its own, one after the other, so that its peak memory is its own.
"""

import argparse
import json
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import h5py
import numpy as np
import pandas as pd
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from tqdm.auto import tqdm

from benchmarks import synthetic
from helpers.datasets import read_ratings
from helpers.files import PROJECT, data_dir, replacing, write_json
from helpers.frames import FIELDS, Frames, read_static, write_static
from tools.readme import replace_block

FRAME_SIZE, EMBED_SIZE, BATCH_SIZE = 10, 128, 8192
BYTES = 4 * (2 * FRAME_SIZE * (EMBED_SIZE + 1) + EMBED_SIZE + 2)  # of a transition in float32
ROUNDS, SECONDS = 11, 1.0  # what is compared closely is measured in turns, and the median counts
N_OLD, N_STATIC = 20_000, 1_500_000  # transitions for the recipe of 2019, and for our static file
HOME = data_dir("synthetic-ml-20m")
RAW, MATRIX, PICKLED, RECNN = HOME / "raw", HOME / "item_matrix.npz", HOME / "embeddings.pkl", HOME / "recnn"


def prepare() -> None:
    """Make what all rows share: the table, the item matrix (also as recnn wants it), and recnn itself."""
    if not (RAW / "ratings.csv").exists():
        synthetic.write(RAW)
    if not PICKLED.exists():
        ids = np.unique(read_ratings(RAW)["item_id"])
        matrix = np.random.default_rng(0).normal(size=(len(ids), EMBED_SIZE)).astype(np.float32)
        np.savez(MATRIX, ids=ids, matrix=matrix)
        with replacing(PICKLED) as beside, beside.open("wb") as file:
            pickle.dump({key: torch.tensor(vector) for key, vector in zip(ids.tolist(), matrix, strict=True)}, file)
    if not RECNN.exists():  # its two files alone: the package itself imports much that is long gone
        with replacing(RECNN) as beside:
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(beside),
                            "recnn==0.1"], check=True)
            (beside / "recnn" / "__init__.py").write_text("")
    Frames(pd.DataFrame({"user_id": 1, "item_id": range(2000), "rating": 3.0, "timestamp": 0}), np.arange(2000),
           np.zeros((2000, 2), np.float32)).gather(torch.arange(1990))  # compiles, once for this machine


def load(n_transitions: int | None = None) -> tuple[Frames, np.ndarray]:
    """Return the frames of all users, or of the first users with about n_transitions."""
    known, ratings = np.load(MATRIX), read_ratings(RAW)
    if n_transitions is not None:
        cut = np.searchsorted(ratings["user_id"], ratings["user_id"].iloc[int(1.08 * n_transitions)])
        ratings = ratings.iloc[:cut]
    return Frames(ratings, known["ids"], known["matrix"], FRAME_SIZE), known["matrix"]


def rate(batches, seconds: float = SECONDS) -> float:
    """Return the transitions a second of an iterable of batches, after its first batch."""
    batches = iter(batches)
    next(batches)
    started, n = time.perf_counter(), 0
    for batch in batches:
        n += len(batch["state"] if isinstance(batch, dict) else batch[0])
        if time.perf_counter() - started > seconds:
            break
    return n / (time.perf_counter() - started)


# --- the ways there were before

def recipe_of_2019(n: int, path: Path) -> tuple[float, float, float, float]:
    """Build n rows one by one, write them one by one, read them back; → build, write, read rates, bytes a row.

    Our plain restatement: a slice of a pandas log a window, a dict of vectors; resizable float32 datasets in
    chunks as h5py guesses them, LZF, one assignment a field and row; batches of 5,000 as float64 tensors.
    """
    known, ratings = np.load(MATRIX), read_ratings(RAW).iloc[:4 * n]
    vector_of = dict(zip(known["ids"].tolist(), torch.from_numpy(known["matrix"]), strict=True))
    logs = ratings.drop(columns="timestamp").set_index("user_id")
    rows, started = [], time.perf_counter()
    for _, log in logs.groupby(level=0):
        for first in range(max(len(log) - FRAME_SIZE, 0)):
            window = log[first:first + FRAME_SIZE + 1][["item_id", "rating"]].values
            vectors, stars = torch.stack([vector_of[int(item)] for item in window[:, 0]]), window[:, 1]
            rows.append((vectors[:-1], stars[:-1], vectors[-1], 2 * (stars[-1] - 2.5), vectors[1:], stars[1:],
                         first + 1 == len(log) - FRAME_SIZE))
        if len(rows) >= n:
            break
    built = time.perf_counter()
    shapes = dict(zip(FIELDS, [(FRAME_SIZE * (EMBED_SIZE + 1),), (EMBED_SIZE,), (), (FRAME_SIZE * (EMBED_SIZE + 1),),
                               ()], strict=True))
    types = dict(zip(FIELDS, ["f", "f", "i1", "f", "?"], strict=True))
    with h5py.File(path, "w") as file:
        state, action, reward, next_state, done = (
            file.create_dataset(name, (0, *shapes[name]), maxshape=(None, *shapes[name]), dtype=types[name],
                                chunks=True, compression="lzf") for name in FIELDS)
        for field in (state, action, reward, next_state, done):
            field.resize(len(rows), axis=0)
        for place, (vectors, stars, taken, points, next_vectors, next_stars, ended) in enumerate(rows):
            state[place] = np.concatenate([vectors.view(-1).numpy(), stars]).astype("float16")
            action[place] = taken.numpy().astype("float16")
            reward[place] = np.int8(points)
            next_state[place] = np.concatenate([next_vectors.reshape(-1).numpy(), next_stars]).astype("float16")
            done[place] = ended
    written = time.perf_counter()
    with h5py.File(path) as file:
        for first in range(0, len(rows), 5000):
            _ = [torch.tensor(np.array(file[name][first:first + 5000]).astype(float)) for name in FIELDS]
    read = time.perf_counter()
    return (len(rows) / (built - started), len(rows) / (written - built), len(rows) / (read - written),
            path.stat().st_size / len(rows))


# --- one process each

def old() -> dict:
    with tempfile.TemporaryDirectory(dir=HOME) as folder:
        build, write, read, size = recipe_of_2019(N_OLD, Path(folder) / "old.hdf5")
    return {"2019, rows built one by one": {"rate": build},
            "2019, static written (rows built and written)": {"rate": 1 / (1 / build + 1 / write), "bytes": size},
            "2019, static written (writing alone)": {"rate": write, "bytes": size},
            "2019, static read": {"rate": read, "bytes": size}}


def recnn() -> dict:
    sys.path.insert(0, str(RECNN))
    tqdm.pandas(disable=True)
    from recnn.data.env import FrameEnv
    started = time.perf_counter()
    env = FrameEnv(PICKLED, RAW / "ratings.csv", frame_size=FRAME_SIZE)
    next(iter(env.train_dataloader))
    rows = {"recnn 0.1, csv → first batch": {"seconds": time.perf_counter() - started}}
    for workers in (0, 1, 2):
        loader = DataLoader(env.train_user_dataset, batch_size=25, shuffle=True, num_workers=workers,
                            collate_fn=env.train_dataloader.collate_fn)
        rows[f"recnn 0.1, loader, {workers} workers"] = {
            "rate": median(rate(loader, 4 * SECONDS) for _ in range(3)), "bytes": BYTES}
    return rows


def per_item() -> dict:
    loader = DataLoader(load()[0], batch_size=256, shuffle=True)
    return {"DataLoader, one __getitem__ a transition": {"rate": rate(loader), "bytes": BYTES}}


def in_turns() -> dict:
    """Measure ours and memcpy by turns in one process: what is compared within a few percent."""
    frames, _ = load()
    width = BYTES // 4
    source = torch.randn(16 * BATCH_SIZE, width)
    target = torch.empty(BATCH_SIZE, width)

    def copies():
        while True:
            for part in source.split(BATCH_SIZE):
                target.copy_(part)
                yield (target,)

    ways = {"ours, dynamic, sequential": lambda seed: frames.batches(BATCH_SIZE, shuffle=False),
            "ours, dynamic, shuffled": lambda seed: frames.batches(BATCH_SIZE, seed=seed),
            "memcpy of the same bytes": lambda seed: copies()}
    rates = {name: [] for name in ways}
    for seed in range(ROUNDS):
        for name, way in ways.items():
            rates[name].append(rate(way(seed)))
    return {name: {"rate": median(found), "rounds": found, "bytes": BYTES} for name, found in rates.items()}


def loader() -> dict:
    frames, _ = load()
    whole = BatchSampler(RandomSampler(frames), BATCH_SIZE, drop_last=False)
    return {f"ours, dynamic, DataLoader of whole batches, {workers} workers": {
        "rate": median(rate(DataLoader(frames, batch_size=None, sampler=whole, num_workers=workers), 2 * SECONDS)
                       for _ in range(3)), "bytes": BYTES} for workers in (0, 2)}


def seconds_to_first_batch() -> float:
    started = time.perf_counter()
    next(load()[0].batches(BATCH_SIZE))
    return time.perf_counter() - started


def first_batch() -> dict:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:  # a new one each
        rounds = [pool.submit(seconds_to_first_batch).result() for _ in range(3)]
    return {"ours, csv → first batch": {"seconds": median(rounds), "rounds": rounds}}


def full_pass() -> dict:
    frames, _ = load()
    started = time.perf_counter()
    n = sum(len(batch.state) for batch in frames.batches(BATCH_SIZE))
    seconds = time.perf_counter() - started
    assert n == len(frames)
    return {f"ours, one shuffled pass over all {n:,}": {"rate": n / seconds, "seconds": seconds, "bytes": BYTES}}


def static() -> dict:
    frames, matrix = load(N_STATIC)
    rows = {}
    for smallest in (False, True):
        label = "ours, static, smallest" if smallest else "ours, static"
        with tempfile.TemporaryDirectory(dir=HOME) as folder:
            path = Path(folder) / "transitions.hdf5"
            started = time.perf_counter()
            write_static(path, frames, "SYNTHETIC", smallest=smallest)
            write, size = len(frames) / (time.perf_counter() - started), path.stat().st_size / len(frames)
            read = median(rate(read_static(path, BATCH_SIZE, FRAME_SIZE, matrix), 60) for _ in range(3))
        rows |= {f"{label}, written": {"rate": write, "bytes": size}, f"{label}, read": {"rate": read, "bytes": size}}
    return rows


def full_static() -> dict:
    """Write and read all transitions once: 14 GB and some four minutes, so only when asked for by name."""
    frames, matrix = load()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on: the table has been read
    with tempfile.TemporaryDirectory(dir=HOME) as folder:
        path, started = Path(folder) / "transitions.hdf5", time.perf_counter()
        write_static(path, frames, "SYNTHETIC")
        written = time.perf_counter()
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
        assert sum(len(batch.state) for batch in read_static(path, BATCH_SIZE, FRAME_SIZE, matrix)) == len(frames)
        read = time.perf_counter()
        size = path.stat().st_size / len(frames)
    return {f"ours, static, all {len(frames):,} written": {"rate": len(frames) / (written - started), "bytes": size,
                                                            "seconds": written - started, "peak_mb_writing": peak},
            f"ours, static, all {len(frames):,} read": {"rate": len(frames) / (read - written), "bytes": size,
                                                         "seconds": read - written}}


PROCESSES = [old, per_item, in_turns, first_batch, full_pass, loader, static, recnn]


def ratios(rows: dict) -> dict:
    """Return how the rows compare; more than 1 means that ours is faster."""
    rate_of = {name: row.get("rate") for name, row in rows.items()}
    shuffled = rate_of["ours, dynamic, shuffled"]
    return {
        "dynamic_vs_2019": shuffled / rate_of["2019, static read"],
        "dynamic_vs_recnn": shuffled / max(rate_of[name] for name in rows if name.startswith("recnn 0.1, loader")),
        "dynamic_vs_memcpy": median(ours / copy for ours, copy in zip(
            rows["ours, dynamic, shuffled"]["rounds"], rows["memcpy of the same bytes"]["rounds"], strict=True)),
        "prepare_vs_recnn": (rows["recnn 0.1, csv → first batch"]["seconds"]
                             / rows["ours, csv → first batch"]["seconds"]),
        "static_write_vs_2019": rate_of["ours, static, written"] / rate_of["2019, static written (writing alone)"],
        "static_read_vs_2019": rate_of["ours, static, read"] / rate_of["2019, static read"],
        "static_bytes_per_transition": rows["ours, static, written"]["bytes"],
        "smallest_bytes_per_transition": rows["ours, static, smallest, written"]["bytes"],
    }


def table(result: dict) -> str:
    """Return the README's table in Markdown."""
    base = result["rows"]["2019, static read"]["rate"]
    lines = ["| way (SYNTHETIC, 18.6 M transitions) | transitions/s | bytes each | peak memory, MB | × 2019 read |",
             "| --- | ---: | ---: | ---: | ---: |"]
    for name, row in result["rows"].items():
        speed = f"{row['rate']:,.0f}" if "rate" in row else f"{row['seconds']:.1f} s"
        size = f"{row['bytes']:,.0f}" if "bytes" in row else ""
        times = f"{row['rate'] / base:.1f}" if "rate" in row else ""
        lines.append(f"| {name} | {speed} | {size} | {row['peak_mb']:,.0f} | {times} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    named = {process.__name__: process for process in [*PROCESSES, full_static]}
    parser.add_argument("process", nargs="?", choices=named, help="run this one alone and print its rows")
    chosen = parser.parse_args().process
    if chosen:
        rows = named[chosen]()
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1e3
        print(json.dumps({name: {**row, "peak_mb": peak} for name, row in rows.items()}))
        return
    prepare()
    rows = {}
    for process in tqdm(PROCESSES, desc="bench", unit="process"):
        command = [sys.executable, "-m", "benchmarks.frames", process.__name__]
        done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
        if done.returncode:
            sys.exit(f"{process.__name__} failed:\n{done.stderr[-3000:]}")
        rows |= json.loads(done.stdout.splitlines()[-1])
    result = {"data": "SYNTHETIC ratings.csv of the shape of MovieLens 20M", "threads": torch.get_num_threads(),
              "batch_size": BATCH_SIZE, "rows": rows, "ratios": ratios(rows)}
    write_json(PROJECT / "res" / "bench_frames.json", result)
    replace_block("bench", table(result))
    print(table(result), *(f"{name:<32}{value:10.2f}" for name, value in result["ratios"].items()), sep="\n")


if __name__ == "__main__":
    main()
