"""Make ratings.csv and movies.csv of the shape of MovieLens 20M, to measure at that size without a download.

SYNTHETIC: there are no such films, and nobody rated them. Lengths of the logs, popularity and stars follow what is
published of MovieLens 20M; who rates what is chance, so nothing about recommendation can be learnt from it.

    python -m benchmarks.synthetic data/synthetic-ml-20m/raw
"""

import argparse
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa
import pyarrow.csv

from helpers.files import replacing, shown

N_USERS, N_ITEMS, N_RATINGS = 138_493, 27_278, 20_000_263
SHORTEST, MEDIAN, LONGEST = 20, 68, 9_254  # ratings a user; the longest log caps the tail
# shares of 0.5, 1, … 5 stars among the ratings of MovieLens 20M
STARS = np.array([239_125, 680_732, 279_252, 1_430_997, 883_398, 4_291_193, 2_200_156, 5_561_926, 1_534_824,
                  2_898_660]) / 20_000_263
GENRES = ("Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
          "Film-Noir", "Horror", "IMAX", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western")
WORDS = ("Night", "House", "Love", "Man", "Last", "Girl", "Blue", "Return", "River", "King", "Secret", "Summer", "Dead",
         "City", "Lost", "Heart", "Road", "Ghost", "Winter", "Stranger")
FIRST, LAST = 789_652_009, 1_427_784_002   # 9 January 1995 to 31 March 2015, seconds since 1970


def log_lengths(rng: np.random.Generator, n_users: int, n_ratings: int, longest: int) -> np.ndarray:
    """Return (n_users,) int64 that sum to n_ratings: at least 20 each, log-normal above, median near 68."""
    spread = np.exp(rng.normal(0, 1.3, n_users))
    low, high = 0.0, float(longest)
    for _ in range(60):  # the scale at which the lengths sum to n_ratings, by bisection
        scale = (low + high) / 2
        lengths = np.minimum(SHORTEST + (scale * spread).astype(np.int64), longest)
        low, high = (scale, high) if lengths.sum() < n_ratings else (low, scale)
    short = n_ratings - lengths.sum()
    room = np.flatnonzero((lengths < longest - 1) & (lengths > SHORTEST))
    chosen = room[rng.choice(len(room), abs(short))]
    np.add.at(lengths, chosen, np.sign(short))
    return lengths


@numba.njit
def draw_items(rng, lengths, cumulated, item_idx):
    """Fill item_idx with distinct items for each user, each draw in proportion to popularity."""
    taken = np.full(len(cumulated), -1)
    place = 0
    for user in range(len(lengths)):
        first = place
        while place < first + lengths[user]:
            item = np.searchsorted(cumulated, rng.random(), side="right")
            if item < len(cumulated) and taken[item] != user:
                taken[item] = user
                item_idx[place] = item
                place += 1
        item_idx[first:place].sort()  # as in the original: sorted by user, then item, not by time


def make(n_users: int = N_USERS, n_items: int = N_ITEMS, n_ratings: int = N_RATINGS, seed: int = 0) -> pa.Table:
    """Return the table `userId, movieId, rating, timestamp`; the same for a seed."""
    rng = np.random.default_rng(seed)
    lengths = log_lengths(rng, n_users, n_ratings, min(LONGEST, n_items // 2))
    popularity = 1 / (np.arange(n_items) + 60) ** 1.35
    cumulated = np.cumsum(popularity / popularity.sum())
    item_idx = np.empty(n_ratings, dtype=np.int32)
    draw_items(rng, lengths, cumulated, item_idx)
    ids = np.sort(rng.choice(np.arange(1, 131_263), n_items, replace=False))  # MovieLens ids have gaps
    rank_to_id = rng.permutation(ids)
    item_id = rank_to_id[item_idx]
    users = np.repeat(np.arange(1, n_users + 1, dtype=np.int32), lengths)
    order = np.lexsort((item_id, users))
    stars = rng.choice(10, n_ratings, p=STARS / STARS.sum()).astype(np.int32)
    joined = np.repeat(rng.integers(FIRST, LAST - 10 ** 7, n_users), lengths)
    timestamp = joined + (rng.exponential(3 * 10 ** 5, n_ratings)).astype(np.int64)
    rating = pa.DictionaryArray.from_arrays(stars, [f"{(n + 1) / 2}" for n in range(10)]).cast(pa.string())
    return pa.table({"userId": users, "movieId": item_id[order].astype(np.int32), "rating": rating,
                     "timestamp": timestamp})


def make_films(ids: np.ndarray, seed: int = 0) -> pa.Table:
    """Return the table `movieId, title, genres` as MovieLens writes it: 1–5 words, a year, 1–4 genres."""
    rng = np.random.default_rng(seed)
    titles = [f"{' '.join(rng.choice(WORDS, n))} ({year})"
              for n, year in zip(rng.integers(1, 6, len(ids)), rng.integers(1930, 2016, len(ids)), strict=True)]
    genres = ["|".join(sorted(rng.choice(GENRES, n, replace=False))) for n in rng.integers(1, 5, len(ids))]
    return pa.table({"movieId": ids, "title": titles, "genres": genres})


def write(folder: Path, **shape) -> Path:
    """Write ratings.csv and movies.csv, with a note beside them that says what they are."""
    path = folder / "ratings.csv"
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(b"userId,movieId,rating,timestamp\n")
        options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="none")
        ratings = make(**shape)
        pyarrow.csv.write_csv(ratings, file, options)
    pyarrow.csv.write_csv(make_films(np.unique(ratings["movieId"].to_numpy())), folder / "movies.csv")
    (folder / "SYNTHETIC.txt").write_text(__doc__, encoding="utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    path = write(parser.parse_args().folder)
    print(f"{shown(path)}: SYNTHETIC, {path.stat().st_size / 1e6:.1f} MB")
