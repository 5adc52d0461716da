"""Measure how fast one and two workers make transitions of their shards: `python -m benchmarks.cluster`.

SYNTHETIC ratings (benchmarks/synthetic.py), two nodes of one core each on this machine, lesson 13's own
`rate_of`: each worker reads its shards and makes shuffled batches, all at the same time. One and two workers are
measured in turns, beside one copy of the same bytes, by one process and by two, which is what the memory allows.
The machine must have two idle cores; with others at work the ratio says nothing.
"""

import argparse
import multiprocessing
import time
from importlib.util import find_spec
from statistics import median

import numpy as np

from benchmarks import synthetic
from helpers.agents import beyond_one_machine
from helpers.extra import cluster
from helpers.files import PROJECT, data_dir, write_json
from helpers.tables import RATING_COLUMNS

FRAME_SIZE, EMBED_SIZE, SHARDS, BATCH_BYTES = 10, 128, 16, 4096 * 10_840


def copied(begin: float, seconds: float) -> int:
    """Return how many batches' bytes one process copies from `begin` on."""
    source, target, n = np.ones(BATCH_BYTES, np.uint8), np.empty(BATCH_BYTES, np.uint8), 0
    target[:] = source
    time.sleep(max(0, begin - time.time()))
    while time.time() < begin + seconds:
        target[:] = source
        n += 1
    return n


def copies(n: int, seconds: float) -> float:
    """Return batches a second that n processes copy together."""
    with multiprocessing.get_context("spawn").Pool(n) as pool:
        return sum(pool.starmap(copied, [(time.time() + 5, seconds)] * n)) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=synthetic.N_USERS // 4)
    parser.add_argument("--ratings", type=int, default=synthetic.N_RATINGS // 4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    if find_spec("ray") is None:
        print(cluster.HOW_TO_GET_IT)
        return
    home = data_dir("synthetic-cluster")
    table = synthetic.make(options.users, n_ratings=options.ratings).to_pandas()
    table.columns = RATING_COLUMNS
    table["rating"] = table["rating"].astype(np.float32)
    (home / "raw").mkdir(exist_ok=True)
    for k in range(4):
        table[k::4].to_parquet(home / "raw" / f"part-{k}.parquet")
    ids = np.unique(table["item_id"])
    rate_of = beyond_one_machine.rate_of
    rates: dict[str, list[float]] = {"1 worker": [], "2 workers": [], "copies by 1": [], "copies by 2": []}
    with cluster.connected(2, store=1 << 30) as engine:
        begun = time.time()
        made = cluster.shard_ratings(home / "raw", home / "shards", SHARDS)
        sharded = len(table) / (time.time() - begun)
        matrix = cluster.share(np.random.default_rng(0).normal(size=(len(ids), EMBED_SIZE)))
        for _ in range(options.rounds):
            for n, name in ((1, "1 worker"), (2, "2 workers")):
                rates[name].append(rate_of(engine, n, str(home / "shards"), ids, matrix, FRAME_SIZE, options.seconds))
                rates[f"copies by {n}"].append(copies(n, options.seconds))
    assert made["ratings"].sum() == len(table)
    result = {"data": "SYNTHETIC", "ratings": len(table), "sharded, ratings/s": round(sharded),
              **{name: round(median(values)) for name, values in rates.items()},
              "two workers, times one": round(median(rates["2 workers"]) / median(rates["1 worker"]), 2),
              "two copies, times one": round(median(rates["copies by 2"]) / median(rates["copies by 1"]), 2)}
    write_json(PROJECT / "res" / "bench_cluster.json", result)
    print(*(f"{name:<28}{value}" for name, value in result.items()), sep="\n")


if __name__ == "__main__":
    main()
