"""Logs by hand, and three folders as people have them, made from a seed: what all lessons must run on."""

import csv
from pathlib import Path

import numpy as np
import pandas as pd

WORDS = ["Salt", "Lantern", "Ferry", "Ash", "Copper", "Quiet", "Orchard", "Winter", "Signal", "Harbour", "Bay", "Road",
         "House", "Letter", "Song", "Garden"]
KINDS = ["Drama", "Comedy", "Crime", "Travel", "Poetry"]


def _logs(rng: np.random.Generator, lengths: np.ndarray, n_items: int) -> pd.DataFrame:
    """Return user, item, stars and second of people with tastes, who take popular things more often."""
    taste, popular = rng.normal(size=(n_items, 4)), 1 / np.arange(1, n_items + 1) ** 0.8
    rows = []
    for user, length in enumerate(lengths):
        likes = taste @ rng.normal(size=4)
        odds = popular * np.exp(likes * 0.6)
        items = rng.choice(n_items, size=min(length, n_items), replace=False, p=odds / odds.sum())
        second = 1_500_000_000 + rng.integers(10 ** 7) + np.cumsum(rng.exponential(30_000, len(items))).astype(int)
        stars = np.clip(np.round(2 * (3.5 + likes[items] * 0.4 + rng.normal(size=len(items)) * 0.5)) / 2, 0.5, 5)
        rows += [(user, *row) for row in zip(items, stars, second, strict=True)]
    return pd.DataFrame(rows, columns=["user", "item", "stars", "second"])


def log_of(rows: list[tuple]) -> pd.DataFrame:
    """Return ratings of (user_id, item_id, rating), given in the order of time."""
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "rating"])
    return table.assign(timestamp=np.arange(len(table))).sort_values(["user_id", "timestamp"])


def clicks(folder: Path) -> None:
    """Write clicks without stars and without genres, their times as dates; whole numbers for ids."""
    rng = np.random.default_rng(1)
    log = _logs(rng, rng.integers(5, 40, 60), 80)
    log["timestamp"] = pd.to_datetime(log["second"], unit="s").dt.strftime("%Y-%m-%d %H:%M:%S")
    log = log.rename(columns={"user": "userId", "item": "movieId"}).sample(frac=1, random_state=1)
    log[["userId", "movieId", "timestamp"]].to_csv(folder / "ratings.csv", index=False)
    titles = [f"{WORDS[item % 16]} {item}" for item in range(80)]
    pd.DataFrame({"movieId": range(80), "title": titles, "genres": ""}).to_csv(folder / "movies.csv", index=False)


def odd(folder: Path) -> None:
    """Write 200 users with all that is legal and rare.

    The first users have 3, 12, 13 and 290 ratings; every fourth has all in one second; some rate again; ids have 19
    digits; titles are emoji, right to left, empty, 3,000 letters; five rated items have no row.
    """
    rng = np.random.default_rng(2)
    lengths = np.r_[3, 12, 13, 290, rng.integers(13, 60, 196)]
    log = _logs(rng, lengths, 300)
    log.loc[log["user"] % 4 == 0, "second"] = 1_500_000_000
    again = log[(log.groupby("user").cumcount() == 5) & (log["user"] % 4 > 0)].assign(stars=3.0)
    log = pd.concat([log, again.assign(second=again["second"] + 1)])
    ids = 1_234_567_890_123_456_000 + 7 * np.arange(300)
    pd.DataFrame({"userId": log["user"] * 1_000_003, "movieId": ids[log["item"]], "rating": log["stars"],
                  "timestamp": log["second"]}).to_csv(folder / "ratings.csv", index=False, quoting=csv.QUOTE_ALL)
    titles = [f"{WORDS[item % 16]} {WORDS[item // 16 % 16]} ({1950 + item % 70})" for item in range(300)]
    titles[:10] = ["$x_$ or $\\frac{$ (2000)", "🎬🍿 (2019)", "שלום עולם (2001)", "\u202eevil\u202c, The (1988)", "",
                   "   ", "x" * 3000, "NaN", 'Comma, "quoted", <b>bold</b> & co (1999)', "(1999)"]
    genres = ["|".join({KINDS[item % 5], KINDS[item * 7 % 5]}) if item % 6 else "(no genres listed)"
              for item in range(300)]
    table = pd.DataFrame({"movieId": ids, "title": titles, "genres": genres})
    table.iloc[:-5].to_csv(folder / "movies.csv", index=False)


def shop(folder: Path) -> None:
    """Write a shop: words for ids of people and things, whole stars, a list literal for genres, no times."""
    rng = np.random.default_rng(3)
    log = _logs(rng, rng.integers(8, 35, 40), 60)
    things = np.array([f"sku <{WORDS[item % 16]}>'{item}" for item in range(60)])
    pd.DataFrame({"user_id": [f"ann.{user}@example.org" for user in log["user"]], "item_id": things[log["item"]],
                  "rating": np.ceil(log["stars"]).astype(int)}).to_csv(folder / "ratings.csv", index=False)
    genres = [str([KINDS[item % 5]]) for item in range(60)]
    pd.DataFrame({"item_id": things, "title": [f"{WORDS[i % 16]} {WORDS[i // 16]}" for i in range(60)],
                  "genres": genres}).to_csv(folder / "movies.csv", index=False)


TABLES = {"clicks": clicks, "odd shelf 🎬": odd, "shop": shop}
